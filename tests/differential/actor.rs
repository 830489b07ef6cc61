//! Several users in one thread.

use std::cell::Cell;

use rustix::fs::{Gid, Mode, Uid};

/// A user with a group of the same number and further groups.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Actor {
    pub name: &'static str,
    pub id: u32,
    pub groups: &'static [u32],
}

/// A group that both ordinary users belong to.
pub const TEAM: u32 = 61300;
/// A group that nobody belongs to.
pub const STRANGERS: u32 = 61301;

pub const ROOT: Actor = Actor {
    name: "root",
    id: 0,
    groups: &[],
};
pub const ALICE: Actor = Actor {
    name: "alice",
    id: 61201,
    groups: &[TEAM],
};
pub const BOB: Actor = Actor {
    name: "bob",
    id: 61202,
    groups: &[TEAM],
};

thread_local! {
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread is an actor until this is dropped. Root's saved ids stay, so that
/// it can come back.
pub struct Acting(());

impl Actor {
    /// Makes the calling thread, and no other, act as this user.
    pub fn act(self, umask: u32) -> Acting {
        if !OWN_UMASK.get() {
            // SAFETY: unsharing CLONE_FS gives this thread an umask, root and working
            // directory of its own; no descriptor and no memory is affected.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
            OWN_UMASK.set(true);
        }
        rustix::process::umask(Mode::from_raw_mode(umask));
        let groups: Vec<Gid> = self
            .groups
            .iter()
            .map(|group| Gid::from_raw(*group))
            .collect();
        let (uid, gid) = (Uid::from_raw(self.id), Gid::from_raw(self.id));
        rustix::thread::set_thread_groups(&groups).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, None).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, None).unwrap();
        Acting(())
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, None).unwrap();
        rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, None).unwrap();
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::process::umask(Mode::from_raw_mode(0o022));
    }
}
