//! The first look at a peer that is new to a tree: whether it can be reached, and which
//! mirror its directory belongs to. A tree without identity joins that mirror: after a
//! lost disk, the host's directory still is the mirror.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use super::failure::{Failure, OrFail};
use crate::replica::Reserved;
use crate::transport::{self, ConnectOptions, Link, PeerUrl, Serve};
use crate::tree::{Id, MirrorId, ReplicaId};
use crate::wire::frame;
use crate::wire::message::{Refusal, ToAgent, ToMount};
use crate::wire::version::{Introduction, answered};

/// How long a peer may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

const OTHER_VERSION: &str = "check that `mirrorfs agent --stdio DIR` works on the peer, and that MIRRORFS_AGENT, if it is set, names a mirrorfs of this version";

/// What a first look at a peer tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Met {
    /// Its directory belongs to this mirror, as this replica if that could be told.
    Mirror(MirrorId, Option<ReplicaId>),
    /// Its directory belongs to no mirror yet.
    Free,
    /// Its directory belonged to no mirror, and by saying hello has become part of this
    /// one, which is new.
    Claimed(MirrorId),
    /// It does not answer now, and trying again may help.
    Away(String),
}

/// Looks at a new peer of a tree in `own` mirror, or of a tree without identity. What
/// only a person can put right is an error here, where that person is watching.
///
/// Only an empty tree joins the mirror of its peer: files of another origin would be
/// merged into it. With [`Serve::Look`] nothing changes over there either.
pub(super) fn meet(
    peer: &PeerUrl,
    own: Option<MirrorId>,
    empty: bool,
    serve: Serve,
) -> Result<Met, Failure> {
    let met = match peer.local_path() {
        Some(path) => match File::open(path) {
            Ok(root) => Reserved::open(root.as_fd())
                .or_fail(|| format!("cannot read the identity of the peer {peer}"))?
                .map_or(Met::Free, |(_, identity)| {
                    Met::Mirror(identity.mirror, Some(identity.replica))
                }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Met::Free,
            Err(error) => {
                return Err(Failure::new(format!("cannot open the peer {peer}")).because(&error));
            }
        },
        None => remote(peer, own, serve)?,
    };
    match (&met, own) {
        (Met::Mirror(found, _), Some(own)) if *found != own => Err(Failure::new(format!(
            "the peer {peer} belongs to another mirror, {found}"
        ))
        .hint("choose another directory, or remove its .mirrorfs if that mirror is gone")),
        (Met::Mirror(found, _), None) if !empty => Err(Failure::new(format!(
            "the peer {peer} belongs to a mirror already, {found}, and the tree has files of its own"
        ))
        .hint("to work on that mirror, mount an empty directory, which is filled from the peer; to merge the two, remove the peer's .mirrorfs first")),
        _ => Ok(met),
    }
}

fn remote(peer: &PeerUrl, own: Option<MirrorId>, serve: Serve) -> Result<Met, Failure> {
    let message = || format!("cannot use the peer {peer}");
    let options = ConnectOptions {
        serve,
        timeout: PATIENCE,
        ..ConnectOptions::from_env().or_fail(message)?
    };
    let link = match transport::connect(peer, &options) {
        Ok(link) => link,
        Err(error) if error.is_away() => return Ok(Met::Away(error.to_string())),
        Err(error) => return Err(Failure::new(message()).because(&error)),
    };
    let mirror = match own {
        Some(own) => own,
        None => Id::random().or_fail(|| "there are no random numbers".into())?,
    };
    match greet(&link, mirror) {
        Ok(ToMount::Hello(_)) if own.is_none() => Ok(Met::Claimed(mirror)),
        Ok(ToMount::Hello(hello)) => Ok(Met::Mirror(mirror, Some(hello.replica))),
        Ok(ToMount::Refused {
            refusal: Refusal::OtherMirror { found },
        }) => Ok(Met::Mirror(found, None)),
        Ok(ToMount::Refused { refusal }) => Err(Failure::new(message()).because(&refusal)),
        Ok(ToMount::Closing { reason }) => {
            let mut failure = Failure::new(message());
            failure.causes.push(reason);
            Err(failure)
        }
        Ok(_) => Err(Failure::new(message()).hint(OTHER_VERSION)),
        Err(error) => {
            let mut failure = Failure::new(message()).because(&error).hint(OTHER_VERSION);
            let said = link.stderr_tail();
            if !said.is_empty() {
                failure.causes.push(said);
            }
            Err(failure)
        }
    }
}

/// Exchanges hellos. The offered mirror becomes that of a directory that has none.
fn greet(link: &Link, mirror: MirrorId) -> Result<ToMount, frame::FrameError> {
    let mut stream = &link.stream;
    stream.set_read_timeout(Some(PATIENCE))?;
    frame::write_magic(&mut stream)?;
    let random = || Id::random().map_err(|error| std::io::Error::other(error.to_string()));
    // No replica yet: the tree gets its own once it is known which mirror it is in.
    let hello = Introduction::hello(mirror, random()?, random()?);
    frame::write_message(&mut stream, &ToAgent::Hello(hello))?;
    frame::read_magic(&mut stream)?;
    let first = frame::read_first(&mut stream)?.ok_or(frame::FrameError::Truncated)?;
    answered(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_peer_tells_its_mirror() {
        let dir = tempfile::tempdir().unwrap();
        let peer = dir.path().join("peer");
        let url = PeerUrl::parse(peer.to_str().unwrap()).unwrap();
        assert_eq!(meet(&url, None, true, Serve::Agent).unwrap(), Met::Free);
        std::fs::create_dir(&peer).unwrap();
        assert_eq!(meet(&url, None, false, Serve::Agent).unwrap(), Met::Free);
        let root = File::open(&peer).unwrap();
        let mirror = Id([9; 16]);
        let (_, identity) = Reserved::create(root.as_fd(), mirror).unwrap();
        let met = Met::Mirror(mirror, Some(identity.replica));
        assert_eq!(meet(&url, None, true, Serve::Agent).unwrap(), met);
        assert_eq!(meet(&url, Some(mirror), false, Serve::Agent).unwrap(), met);
        let failure = meet(&url, Some(Id([8; 16])), true, Serve::Agent).unwrap_err();
        assert!(failure.message.contains("another mirror"), "{failure}");
        let failure = meet(&url, None, false, Serve::Agent).unwrap_err();
        assert!(
            failure.message.contains("belongs to a mirror already"),
            "{failure}"
        );
    }
}
