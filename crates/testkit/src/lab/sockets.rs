//! The sockets of a host, as the kernel lists them.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::host::Host;

impl Host {
    /// Returns the addresses at which its programs wait for TCP connections.
    pub fn listening(&self) -> Vec<String> {
        let listens = |socket: &Socket| socket.state == "0A";
        self.tcp_sockets().into_iter().filter(listens).map(|socket| socket.near).collect()
    }

    /// Returns the addresses, near and far, of its TCP connections.
    pub fn connected(&self) -> Vec<(String, String)> {
        let connected = |socket: &Socket| socket.state == "01";
        let sockets = self.tcp_sockets().into_iter().filter(connected);
        sockets.map(|socket| (socket.near, socket.far)).collect()
    }

    fn tcp_sockets(&self) -> Vec<Socket> {
        let mut found = Vec::new();
        for table in ["tcp", "tcp6"] {
            let text = fs::read_to_string(format!("/proc/{}/net/{table}", self.init()));
            found.extend(text.unwrap_or_default().lines().filter_map(Socket::parse));
        }
        found
    }

    /// Returns the names of its Unix sockets, `@` before those that are no files.
    pub(super) fn unix_sockets(&self) -> Vec<String> {
        let text = fs::read_to_string(format!("/proc/{}/net/unix", self.init()));
        let text = text.unwrap_or_default();
        let names = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7));
        names.map(str::to_owned).collect()
    }
}

/// A line of `/proc/net/tcp` or `tcp6` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    near: String,
    far: String,
    /// As the kernel numbers them: 01 is connected, 0A listens.
    state: String,
}

impl Socket {
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (near, far) = (address(fields.get(1)?)?, address(fields.get(2)?)?);
        Some(Self { near, far, state: (*fields.get(3)?).to_owned() })
    }
}

/// Returns an address and port as they are usually written.
fn address(field: &str) -> Option<String> {
    let (address, port) = field.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of 32 bits, each as it lies in memory.
    let words = address.as_bytes().chunks(8).map(|word| str::from_utf8(word).ok());
    let words = words.map(|word| u32::from_str_radix(word?, 16).ok());
    let bytes: Vec<u8> =
        words.collect::<Option<Vec<_>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let address = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(bytes) => Ipv4Addr::from(bytes).into(),
        Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into(),
    };
    Some(SocketAddr::new(address, port).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_list_of_sockets() {
        let cases = [
            (
                "   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000",
                Some(("127.0.0.1:5432", "0.0.0.0:0", "0A")),
            ),
            (
                "   1: 0100007F:1538 0200007F:270F 01 00000000:00000000 00:00000000",
                Some(("127.0.0.1:5432", "127.0.0.2:9999", "01")),
            ),
            (
                "   0: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0",
                Some(("[::1]:22", "[::]:0", "0A")),
            ),
            ("  sl  local_address rem_address   st tx_queue rx_queue", None),
        ];
        for (line, want) in cases {
            let want = want.map(|(near, far, state)| Socket {
                near: near.into(),
                far: far.into(),
                state: state.into(),
            });
            assert_eq!(Socket::parse(line), want, "{line}");
        }
    }
}
