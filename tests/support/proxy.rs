//! A TCP link as bad as it is told to be: it can be cut, reset, stalled in both directions
//! or in one, refused, slow, and far away.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::random::Random;

/// What of a direction a link that is far or slow holds, in pieces of 16 KiB: like the
/// buffers of the network, more than one would wish.
const QUEUE: usize = 64;

/// Forwards connections to a port of this machine, as well or as badly as it is told.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A direction of the link, as seen from who connects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    There,
    Back,
}

#[derive(Default)]
struct State {
    connections: Vec<TcpStream>,
    /// Connections forwarded so far.
    accepted: u64,
    /// Bytes forwarded so far, there and back.
    forwarded: [u64; 2],
    /// Connections up to this number forward nothing more.
    frozen: u64,
    refusing: bool,
    stalled: [bool; 2],
    /// The end of a connection is not passed on.
    closes_held: bool,
    /// Bytes a second, in each direction.
    limit: Option<u64>,
    /// How long everything takes to the other end, and how much longer at random.
    latency: Duration,
    jitter: Duration,
    /// Cut everything once so much has been forwarded in both directions.
    cut_at: Option<u64>,
    ended: bool,
}

impl State {
    fn restore(&mut self) {
        self.refusing = false;
        self.stalled = [false; 2];
        self.closes_held = false;
        self.limit = None;
        self.latency = Duration::ZERO;
        self.jitter = Duration::ZERO;
        self.cut_at = None;
    }

    fn cut(&mut self) {
        self.cut_at = None;
        for connection in self.connections.drain(..) {
            connection.shutdown(Shutdown::Both).ok();
        }
    }

    fn reset(&mut self) {
        for connection in self.connections.drain(..) {
            // The kernel sends a reset, whatever there is still to be read.
            rustix::net::connect_unspec(&connection).ok();
        }
    }

    fn all_forwarded(&self) -> u64 {
        self.forwarded.iter().sum()
    }
}

impl Proxy {
    /// Starts a perfect link to a port of this machine.
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accept(&listener, port, &accepting));
        Self { address, shared }
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Cuts all connections at once. New ones are forwarded.
    pub fn cut(&self) {
        self.change(State::cut);
    }

    /// Cuts all connections by a reset to both ends. New ones are forwarded.
    pub fn reset(&self) {
        self.change(State::reset);
    }

    /// Cuts all connections and accepts no new ones until [`Proxy::restore`].
    pub fn refuse(&self) {
        self.change(|state| {
            state.refusing = true;
            state.cut();
        });
    }

    /// Forwards nothing more, and keeps the connections open: a peer that fell silent.
    pub fn stall(&self) {
        self.change(|state| state.stalled = [true; 2]);
    }

    /// Forwards nothing more in one direction.
    pub fn stall_way(&self, way: Way) {
        self.change(|state| state.stalled[way as usize] = true);
    }

    /// Has the connections of now fall silent for ever without closing them: half-open.
    /// New ones are forwarded.
    pub fn freeze(&self) {
        self.change(|state| state.frozen = state.accepted);
    }

    /// Does not pass the end of a connection on to the other side.
    pub fn hold_closes(&self) {
        self.change(|state| state.closes_held = true);
    }

    /// Forwards at most so many bytes a second in each direction.
    pub fn limit(&self, bytes_per_second: u64) {
        self.change(|state| state.limit = Some(bytes_per_second));
    }

    /// Everything takes so long to the other end, and up to so much longer at random.
    pub fn far(&self, latency: Duration, jitter: Duration) {
        self.change(|state| (state.latency, state.jitter) = (latency, jitter));
    }

    /// Cuts all connections once so many more bytes have been forwarded, in the middle
    /// of whatever they are.
    pub fn cut_after(&self, bytes: u64) {
        self.change(|state| state.cut_at = Some(state.all_forwarded() + bytes));
    }

    /// Makes it a perfect link again until so many more bytes have been forwarded; then
    /// all connections are cut.
    pub fn restore_for(&self, bytes: u64) {
        self.change(|state| {
            state.restore();
            state.cut_at = Some(state.all_forwarded() + bytes);
        });
    }

    /// Makes it a perfect link again.
    pub fn restore(&self) {
        self.change(State::restore);
    }

    /// How many connections have been forwarded since the start.
    pub fn accepted(&self) -> u64 {
        self.shared.state.lock().unwrap().accepted
    }

    /// How many bytes have been forwarded since the start.
    pub fn forwarded(&self) -> u64 {
        self.shared.state.lock().unwrap().all_forwarded()
    }

    /// How many of them in one direction.
    pub fn forwarded_way(&self, way: Way) -> u64 {
        self.shared.state.lock().unwrap().forwarded[way as usize]
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state.lock().unwrap());
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.change(|state| {
            state.ended = true;
            state.cut();
        });
        // Wakes the accepting thread.
        TcpStream::connect(self.address).ok();
    }
}

fn accept(listener: &TcpListener, port: u16, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        let Ok(client) = client else { return };
        let mut state = shared.state.lock().unwrap();
        if state.ended {
            return;
        }
        if state.refusing {
            continue;
        }
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
            continue;
        };
        state.accepted += 1;
        let number = state.accepted;
        for (from, to, way) in [
            (&client, &server, Way::There),
            (&server, &client, Way::Back),
        ] {
            from.set_nodelay(true).ok();
            state.connections.push(from.try_clone().unwrap());
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let (pieces, to_write) = sync_channel(QUEUE);
            let reading = Arc::clone(shared);
            std::thread::spawn(move || read(from, number, &pieces, &reading));
            let shared = Arc::clone(shared);
            std::thread::spawn(move || write(to, &to_write, way, number, &shared));
        }
    }
}

/// A piece of what was read, and when it is due at the other end.
type Piece = (Vec<u8>, Instant);

fn read(mut from: TcpStream, number: u64, pieces: &SyncSender<Piece>, shared: &Shared) {
    let mut random = Random::of(number);
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let (latency, jitter) = {
            let state = shared.state.lock().unwrap();
            (state.latency, state.jitter)
        };
        let longer = jitter.mul_f64(random.between(0, 1000) as f64 / 1000.0);
        let due = Instant::now() + latency + longer;
        if pieces.send((buffer[..count].to_vec(), due)).is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Read).ok();
}

fn write(mut to: TcpStream, pieces: &Receiver<Piece>, way: Way, number: u64, shared: &Arc<Shared>) {
    for (piece, due) in pieces {
        // Taking its time is the very thing that this link is asked to do, here and below.
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut state = shared.state.lock().unwrap();
        while (state.stalled[way as usize] || number <= state.frozen) && !state.ended {
            state = shared.changed.wait(state).unwrap();
        }
        let all = state.all_forwarded();
        let room = state.cut_at.map(|at| at.saturating_sub(all));
        let cut = room.is_some_and(|room| room <= piece.len() as u64);
        let passed = room.filter(|_| cut).unwrap_or(piece.len() as u64);
        state.forwarded[way as usize] += passed;
        let limit = state.limit;
        drop(state);
        if to.write_all(&piece[..passed as usize]).is_err() {
            break;
        }
        if cut {
            shared.state.lock().unwrap().cut();
            break;
        }
        if let Some(limit) = limit {
            std::thread::sleep(Duration::from_secs_f64(passed as f64 / limit as f64));
        }
    }
    let mut state = shared.state.lock().unwrap();
    while state.closes_held && !state.ended {
        state = shared.changed.wait(state).unwrap();
    }
    drop(state);
    to.shutdown(Shutdown::Write).ok();
}
