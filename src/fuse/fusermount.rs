//! Mounting and unmounting through `fusermount3`, which is set-uid: how an ordinary
//! user does it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

const PROGRAM: &str = "fusermount3";

/// Mounts over a directory and returns the FUSE descriptor, which `fusermount3` sends
/// back over a socket.
pub(super) fn mount(dir: &Path, options: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    // As its standard input the socket needs no inheritable descriptor of ours.
    let output = Command::new(PROGRAM)
        .arg("-o")
        .arg(options)
        .arg("--")
        .arg(dir)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .output()
        .map_err(not_found)?;
    if !output.status.success() {
        return Err(failed(&output));
    }
    receive(&ours)
}

/// Unmounts, unless something still uses the mount.
pub(super) fn unmount(dir: &Path, lazy: bool) -> io::Result<()> {
    let output = Command::new(PROGRAM)
        .arg(if lazy { "-uz" } else { "-u" })
        .arg("--")
        .arg(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(not_found)?;
    if output.status.success() {
        return Ok(());
    }
    if String::from_utf8_lossy(&output.stderr).contains("busy") {
        return Err(rustix::io::Errno::BUSY.into());
    }
    Err(failed(&output))
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        socket,
        &mut [io::IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
            && let Some(descriptor) = descriptors.next()
        {
            return Ok(descriptor);
        }
    }
    Err(io::Error::other(format!(
        "{PROGRAM} mounted, but sent no descriptor"
    )))
}

fn failed(output: &Output) -> io::Error {
    io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

fn not_found(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::NotFound {
        return io::Error::new(
            error.kind(),
            format!("{PROGRAM} is not installed; install the package fuse3, or mount as root"),
        );
    }
    error
}
