//! The FUSE adapter: the kernel's requests to [`FileSystem`] and back. No decisions about data are
//! made here.
//!
//! Opening needs no message (the kernel is told ENOSYS once and then opens by itself, keeping its
//! cache): a file lives by the kernel's references alone. Names and attributes are valid for a
//! year, and names that are not there too: all changes come through this kernel. The writeback
//! cache makes the kernel the owner of sizes and times of open files.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, Notifier, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::fs::{FallocateFlags, FileType as Sort, Mode, OFlags};
use rustix::io::Errno;

use crate::filesystem::{Change, FileSystem, RenameMode};
use crate::names::{Attributes, Kind};
use crate::{Ino, Owner};

/// How long the kernel may keep names and attributes.
const VALID: Duration = Duration::from_secs(365 * 24 * 3600);
/// Numbers are never used twice, so one generation is enough.
const GENERATION: Generation = Generation(0);
/// Largest write in one request; the kernel's own limit without privileges.
const MAX_WRITE: u32 = 1 << 20;
/// Read-ahead and write-back share this many requests in flight: writes must not wait for stalled
/// reads.
const MAX_BACKGROUND: u16 = 4096;
/// Directory entries fetched at a time.
const BATCH: usize = 512;

/// How to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeOptions {
    /// Threads that take the kernel's requests (each has a buffer of 16 MiB, touched only as far as
    /// used).
    pub fuse_threads: usize,
    /// Threads that wait for the lower.
    pub pool_threads: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { fuse_threads: 4, pool_threads: 8 }
    }
}

/// Serves `device`, an already mounted FUSE device ([`crate::mount_as_root`],
/// [`crate::mount_as_user`]), until it is unmounted. The process may run under another user than
/// the one that mounted.
///
/// The process must not use the mount itself: whoever waits for his own mount cannot be killed, and
/// unmapping a file of it waits for the server while the server waits for the process's memory
/// lock.
///
/// Ends with [`FileSystem::abort`], which ends the threads that wait for the lower.
///
/// # Errors
/// If the kernel's greeting fails or a thread cannot be started.
pub fn serve(fs: Arc<FileSystem>, device: OwnedFd, options: ServeOptions) -> io::Result<()> {
    fs.start_workers(options.pool_threads)?;
    let mut config = Config::default();
    config.acl = SessionACL::All; // the kernel has checked: the mount's user, or all with `allow_other`
    config.n_threads = Some(options.fuse_threads.max(1));
    config.clone_fd = can_clone(&device);
    let session = Session::from_fd(Adapter(fs.clone()), device, config.acl, config);
    let served = session.and_then(|session| {
        let kernel = session.notifier();
        fs.on_new_name(Some(Box::new(move |parent, name| forget_absence(&kernel, parent, name))));
        session.run()
    });
    fs.on_new_name(None); // it holds the device
    fs.abort();
    match served {
        Err(err) if err.kind() == io::ErrorKind::NotConnected => Ok(()), // unmounted before the greeting
        other => other,
    }
}

/// Makes the kernel forget that there is no `name` in `parent`, and how many directories that has. An error means that the
/// kernel remembers nothing of it.
fn forget_absence(kernel: &Notifier, parent: Ino, name: &[u8]) {
    let forgotten = kernel.inval_entry(INodeNo(parent), OsStr::from_bytes(name));
    if let Err(err) = forgotten.and_then(|()| kernel.inval_inode(INodeNo(parent), -1, 0)) {
        tracing::debug!(parent, "nothing to forget: {err}");
    }
}

/// Returns whether each thread can have a descriptor of its own: needs the right to open
/// `/dev/fuse`, which the process that mounted may have had alone.
fn can_clone(device: &OwnedFd) -> bool {
    const CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0); // FUSE_DEV_IOC_CLONE
    let Ok(another) = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    else {
        return false;
    };
    // SAFETY: the ioctl reads a `u32`, the number of an open FUSE descriptor, and writes nothing
    // (linux/fuse.h).
    let clone =
        unsafe { rustix::ioctl::Setter::<CLONE, u32>::new(device.as_raw_fd().unsigned_abs()) };
    // SAFETY: as above; `another` was just opened and belongs to nobody else.
    unsafe { rustix::ioctl::ioctl(&another, clone) }.is_ok()
}

struct Adapter(Arc<FileSystem>);

impl Adapter {
    fn attr(&self, attributes: &Attributes) -> FileAttr {
        file_attr(attributes, self.0.owner())
    }

    fn entry(&self, reply: ReplyEntry, made: crate::Result<Attributes>) {
        match made {
            Ok(attributes) => reply.entry(&VALID, &self.attr(&attributes), GENERATION),
            Err(errno) => reply.error(error(errno)),
        }
    }

    /// Makes a file, or takes the one that is there if that is allowed.
    fn made_or_there(
        &self,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> crate::Result<Attributes> {
        let flags = OFlags::from_bits_retain(flags.unsigned_abs());
        match self.0.create(parent, name, permissions(mode)) {
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                let there = self.0.lookup(parent, name)?;
                if flags.contains(OFlags::TRUNC) {
                    self.0.setattr(there.ino, Change { size: Some(0), ..Change::default() })
                } else {
                    Ok(there)
                }
            }
            other => other,
        }
    }
}

fn file_attr(attributes: &Attributes, owner: Owner) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: attributes.size.div_ceil(512),
        atime: attributes.mtime,
        mtime: attributes.mtime,
        ctime: attributes.ctime,
        crtime: UNIX_EPOCH,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: attributes.links,
        uid: owner.uid,
        gid: owner.gid,
        rdev: 0,
        blksize: 8192,
        flags: 0,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
    }
}

fn permissions(mode: u32) -> u16 {
    (mode & 0o7777) as u16
}

fn error(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw_os_error())
}

fn done(reply: ReplyEmpty, result: crate::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(error(errno)),
    }
}

fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_WRITEBACK_CACHE,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_NO_OPEN_SUPPORT,
        ];
        for capability in wanted {
            if config.add_capabilities(capability).is_err() {
                tracing::info!("this kernel's FUSE has no {capability:?}");
            }
        }
        let refused = |nearest: u32| io::Error::other(format!("FUSE takes {nearest} instead"));
        config.set_max_write(MAX_WRITE).map_err(refused)?;
        config.set_max_background(MAX_BACKGROUND).map_err(|nearest| refused(nearest.into()))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.lookup(parent.0, name.as_bytes()) {
            Err(Errno::NOENT) => {
                // Number 0: "not there", to be remembered.
                let nothing = Attributes {
                    ino: 0,
                    kind: Kind::File,
                    size: 0,
                    mode: 0,
                    links: 0,
                    mtime: UNIX_EPOCH,
                    ctime: UNIX_EPOCH,
                };
                reply.entry(&VALID, &self.attr(&nothing), GENERATION);
            }
            found => self.entry(reply, found),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, references: u64) {
        self.0.forget(ino.0, references);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.getattr(ino.0) {
            Ok(attributes) => reply.attr(&VALID, &self.attr(&attributes)),
            Err(errno) => reply.error(error(errno)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let owner = self.0.owner();
        if uid.is_some_and(|uid| uid != owner.uid) || gid.is_some_and(|gid| gid != owner.gid) {
            return reply.error(fuser::Errno::EPERM);
        }
        let change = Change { mode: mode.map(permissions), size, mtime: mtime.map(time), ctime };
        match self.0.setattr(ino.0, change) {
            Ok(attributes) => reply.attr(&VALID, &self.attr(&attributes)),
            Err(errno) => reply.error(error(errno)),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.0.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(error(errno)),
        }
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        if Sort::from_raw_mode(mode) != Sort::RegularFile {
            return reply.error(fuser::Errno::EPERM);
        }
        self.entry(reply, self.0.create(parent.0, name.as_bytes(), permissions(mode)));
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        self.entry(reply, self.0.mkdir(parent.0, name.as_bytes(), permissions(mode)));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.0.unlink(parent.0, name.as_bytes()));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.0.rmdir(parent.0, name.as_bytes()));
    }

    fn symlink(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        self.entry(reply, self.0.symlink(parent.0, name.as_bytes(), target.as_os_str().as_bytes()));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = match flags {
            flags if flags.is_empty() => RenameMode::Replace,
            RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            RenameFlags::RENAME_EXCHANGE => RenameMode::Exchange,
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        done(
            reply,
            self.0.rename((parent.0, name.as_bytes()), (newparent.0, newname.as_bytes()), mode),
        );
    }

    fn link(
        &self,
        _: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        self.entry(reply, self.0.link(ino.0, newparent.0, newname.as_bytes()));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(fuser::Errno::ENOSYS); // "open without asking, and keep the cache"
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match self.made_or_there(parent.0, name.as_bytes(), mode, flags) {
            Ok(attributes) => {
                let attr = self.attr(&attributes);
                reply.created(
                    &VALID,
                    &attr,
                    GENERATION,
                    FileHandle(0),
                    FopenFlags::FOPEN_KEEP_CACHE,
                );
            }
            Err(errno) => reply.error(error(errno)),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0.read(ino.0, offset, size as usize, move |read| match read {
            Ok(bytes) => reply.data(bytes),
            Err(errno) => reply.error(error(errno)),
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let length = data.len() as u32; // not more than MAX_WRITE
        self.0.write(ino.0, offset, data, move |written| match written {
            Ok(()) => reply.written(length),
            Err(errno) => reply.error(error(errno)),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS); // the kernel has written its cache back by itself; nothing else to do
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(reply, self.0.fsync(ino.0));
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(reply, self.0.fsync(ino.0));
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.unsigned_abs());
        let grow = !mode.contains(FallocateFlags::KEEP_SIZE);
        match mode.difference(FallocateFlags::KEEP_SIZE) {
            rest if rest.is_empty() => done(reply, self.0.allocate(ino.0, offset, length, grow)),
            FallocateFlags::ZERO_RANGE => {
                self.0.zero(ino.0, offset, length, grow, move |result| done(reply, result));
            }
            FallocateFlags::PUNCH_HOLE if !grow => {
                self.0.zero(ino.0, offset, length, false, move |result| done(reply, result));
            }
            _ => reply.error(fuser::Errno::EOPNOTSUPP),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let mut cookie = offset;
        loop {
            let batch = match self.0.list(ino.0, cookie, BATCH) {
                Ok(batch) => batch,
                Err(errno) => return reply.error(error(errno)),
            };
            for entry in &batch {
                let name = OsStr::from_bytes(&entry.name);
                if reply.add(INodeNo(entry.ino), entry.cookie, file_type(entry.kind), name) {
                    return reply.ok();
                }
                cookie = entry.cookie;
            }
            if batch.len() < BATCH {
                return reply.ok();
            }
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let mut cookie = offset;
        loop {
            let batch = match self.0.list(ino.0, cookie, BATCH) {
                Ok(batch) => batch,
                Err(errno) => return reply.error(error(errno)),
            };
            for entry in &batch {
                let name = OsStr::from_bytes(&entry.name);
                let dots = matches!(&entry.name[..], b"." | b".."); // the kernel takes no reference for these
                let found = if dots { self.0.getattr(entry.ino) } else { self.0.refer(entry.ino) };
                let Ok(attributes) = found else { continue }; // removed since the batch was fetched
                let attr = self.attr(&attributes);
                if reply.add(attr.ino, entry.cookie, name, &VALID, &attr, GENERATION) {
                    if !dots {
                        self.0.forget(entry.ino, 1);
                    }
                    return reply.ok();
                }
                cookie = entry.cookie;
            }
            if batch.len() < BATCH {
                return reply.ok();
            }
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.0.statfs() {
            Ok(space) => {
                let block = u32::try_from(space.block_size).unwrap_or(u32::MAX);
                let (files, free) = (space.files, space.files_free);
                reply.statfs(
                    space.blocks,
                    space.free,
                    space.available,
                    files,
                    free,
                    block,
                    255,
                    block,
                );
            }
            Err(errno) => reply.error(error(errno)),
        }
    }
}
