//! Handing a connection over: its own descriptors go to whoever listens on a Unix socket, so that no byte of it is copied here.
//!
//! sshd ends a connection with the process that it started. That is this one: it stays until the new owner has closed its end
//! of the socket.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most bytes that are said with a connection.
const SAID_MOST: usize = 1024;

/// A connection that was handed over.
#[derive(Debug)]
pub struct Handed {
    /// From the far side.
    pub input: OwnedFd,
    /// To the far side.
    pub output: OwnedFd,
    /// The process that handed it over ends with this, and the connection with it.
    pub holder: UnixStream,
    /// What was said with it.
    pub said: String,
}

/// Bytes that a pipe may hold for an ordinary account (pipe(7), `/proc/sys/fs/pipe-max-size`).
const WIDE: usize = 1 << 20;

/// Lets a pipe of bulk data hold more, so that its two ends wake each other less often. A socket, or an account that has used up its
/// pipes' memory, stays as it is.
pub fn widen(pipe: impl AsFd) {
    let _ = rustix::pipe::fcntl_setpipe_size(pipe, WIDE);
}

/// Hands `input` and `output` to whoever listens on `socket`, with the words `said`, and waits until it is done with them.
///
/// # Errors
/// When nobody listens there, or as the kernel says.
pub fn hand_over(socket: &Path, said: &str, input: OwnedFd, output: OwnedFd) -> io::Result<()> {
    let named =
        |err: io::Error| io::Error::new(err.kind(), format!("`{}`: {err}", socket.display()));
    let mut stream = UnixStream::connect(socket).map_err(named)?;
    let descriptors = [input.as_fd(), output.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(
        &stream,
        &[IoSlice::new(b" "), IoSlice::new(said.as_bytes())],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    drop((input, output));
    let _ = stream.read(&mut [0]); // nothing ever comes but the end
    Ok(())
}

/// Takes over what [`hand_over`] has sent on an accepted connection.
///
/// # Errors
/// When something else came, or as the kernel says.
pub fn take_over(holder: UnixStream) -> io::Result<Handed> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut words = [0; SAID_MOST];
    let words_slices = &mut [IoSliceMut::new(&mut words)];
    let count = recvmsg(&holder, words_slices, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let said = String::from_utf8_lossy(&words[..count]).trim_start().to_owned();
    let mut received = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let mut descriptors = received.next().into_iter().flatten();
    match (descriptors.next(), descriptors.next()) {
        (Some(input), Some(output)) => Ok(Handed { input, output, holder, said }),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no connection was handed over")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_connection_changes_hands() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (far_in, near_out) = rustix::pipe::pipe().unwrap();
        let (near_in, far_out) = rustix::pipe::pipe().unwrap();
        let handing = std::thread::spawn(move || hand_over(&path, "a word", near_in, near_out));
        let handed = take_over(listener.accept().unwrap().0).unwrap();
        assert_eq!(handed.said, "a word");
        File::from(far_out).write_all(b"question").unwrap();
        let mut text = String::new();
        File::from(handed.input).read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        File::from(handed.output).write_all(b"answer").unwrap();
        let mut answer = String::new();
        File::from(far_in).read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer", "nobody else holds the pipe open");
        assert!(!handing.is_finished(), "it ends with its holder");
        drop(handed.holder);
        handing.join().unwrap().unwrap();
    }

    #[test]
    fn pipes_are_widened_and_nothing_else() {
        let (input, output) = rustix::pipe::pipe().unwrap();
        widen(&output);
        assert_eq!(rustix::pipe::fcntl_getpipe_size(&input).unwrap(), WIDE);
        widen(UnixStream::pair().unwrap().0);
    }

    #[test]
    fn without_a_listener_it_fails() {
        let (input, output) = rustix::pipe::pipe().unwrap();
        let err = hand_over(Path::new("/no/such/socket"), "", input, output).unwrap_err();
        assert!(err.to_string().contains("/no/such/socket"), "{err}");
    }
}
