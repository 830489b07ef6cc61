//! What the engine would do on other threads waits here until the simulation has it done.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Whose work it is: the simulation numbers them.
pub(crate) type Owner = u64;

/// Tries to do a piece of work. Gives it back if it has to wait for something.
type Work = Box<dyn FnMut() -> Progress>;

/// How a piece of work went on.
#[derive(PartialEq, Eq)]
enum Progress {
    Done,
    Waits,
}

thread_local! {
    static QUEUE: RefCell<Option<Vec<(Owner, Work)>>> = const { RefCell::new(None) };
    static OWNER: Cell<Owner> = const { Cell::new(0) };
}

/// From now on this thread's work waits.
pub(crate) fn start() {
    QUEUE.set(Some(Vec::new()));
}

/// From now on it is done by other threads again.
pub(crate) fn stop() {
    QUEUE.set(None);
}

/// Whether this thread simulates.
pub(crate) fn is_simulated() -> bool {
    QUEUE.with_borrow(Option::is_some)
}

/// Whose work is put off from now on.
pub(crate) fn owner(owner: Owner) {
    OWNER.set(owner);
}

/// Takes a piece of work in a simulation, and gives it back elsewhere.
pub(crate) fn put_off<F: FnOnce() + 'static>(work: F) -> Option<F> {
    QUEUE.with_borrow_mut(|queue| match queue {
        Some(queue) => {
            let mut work = Some(work);
            let work = move || {
                if let Some(work) = work.take() {
                    work();
                }
                Progress::Done
            };
            queue.push((OWNER.get(), Box::new(work)));
            None
        }
        None => Some(work),
    })
}

/// The same for work that waits for something first.
pub(crate) fn put_off_until<R, T, F>(room: R, work: F) -> Option<(R, F)>
where
    R: Future<Output = Option<T>> + Send + 'static,
    T: 'static,
    F: FnOnce(T) + 'static,
{
    if !is_simulated() {
        return Some((room, work));
    }
    let mut room: Pin<Box<dyn Future<Output = Option<T>>>> = Box::pin(room);
    let mut work = Some(work);
    let work = move || match room.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Pending => Progress::Waits,
        Poll::Ready(room) => {
            if let (Some(work), Some(room)) = (work.take(), room) {
                work(room);
            }
            Progress::Done
        }
    };
    QUEUE.with_borrow_mut(|queue| {
        queue
            .get_or_insert_default()
            .push((OWNER.get(), Box::new(work)));
    });
    None
}

/// How many pieces of work of an owner wait.
pub(crate) fn waiting(owner: Owner) -> usize {
    QUEUE.with_borrow(|queue| {
        let queue = queue.iter().flatten();
        queue.filter(|(of, _)| *of == owner).count()
    })
}

/// Does the oldest piece of work of an owner that can be done. Says whether there was one.
pub(crate) fn work(owner: Owner) -> bool {
    let taken = QUEUE.with_borrow_mut(|queue| {
        let queue = queue.as_mut()?;
        let mine = std::mem::take(queue);
        let (mine, others): (Vec<_>, Vec<_>) = mine.into_iter().partition(|(of, _)| *of == owner);
        *queue = others;
        Some(mine)
    });
    let mut done = false;
    let mut left = Vec::new();
    for (of, mut work) in taken.into_iter().flatten() {
        if !done {
            OWNER.set(of);
            done = work() == Progress::Done;
            if done {
                continue;
            }
        }
        left.push((of, work));
    }
    QUEUE.with_borrow_mut(|queue| {
        if let Some(queue) = queue {
            // What the work itself put off comes after what was waiting.
            left.append(queue);
            *queue = left;
        }
    });
    done
}

/// Forgets all work of an owner: its process has died.
pub(crate) fn forget(owner: Owner) {
    let forgotten = QUEUE.with_borrow_mut(|queue| {
        let queue = queue.as_mut()?;
        let (gone, left): (Vec<_>, Vec<_>) = std::mem::take(queue)
            .into_iter()
            .partition(|(of, _)| *of == owner);
        *queue = left;
        Some(gone)
    });
    drop(forgotten);
}

/// Runs a future that waits for nothing in a simulation.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("the engine waits for something that the simulation does not do"),
    }
}

thread_local! {
    static OTHERS: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
}

/// Says what other processes do while this one waits for them.
pub(crate) fn set_others(others: Option<Box<dyn FnMut()>>) {
    OTHERS.set(others);
}

/// Lets the other processes go on, in a simulation. They are not let wait in turn.
pub(crate) fn others_go_on() -> bool {
    let Some(mut others) = OTHERS.take() else {
        return false;
    };
    others();
    OTHERS.set(Some(others));
    true
}
