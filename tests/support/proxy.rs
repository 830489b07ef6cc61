//! A TCP link that can be cut, stalled, refused and slowed down.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Forwards connections to a port of this machine, as well or as badly as it is told.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    connections: Vec<TcpStream>,
    /// Connections forwarded so far.
    accepted: u64,
    /// Bytes forwarded so far, in both directions.
    forwarded: u64,
    /// Connections up to this number forward nothing more.
    frozen: u64,
    refusing: bool,
    stalled: bool,
    /// Bytes a second, in each direction.
    limit: Option<u64>,
    /// Cut everything once `forwarded` has come this far.
    cut_at: Option<u64>,
    ended: bool,
}

impl State {
    fn cut(&mut self) {
        self.cut_at = None;
        for connection in self.connections.drain(..) {
            connection.shutdown(Shutdown::Both).ok();
        }
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

    /// Cuts all connections and accepts no new ones until [`Proxy::restore`].
    pub fn refuse(&self) {
        self.change(|state| {
            state.refusing = true;
            state.cut();
        });
    }

    /// Forwards nothing more, and keeps the connections open: a peer that fell silent.
    pub fn stall(&self) {
        self.change(|state| state.stalled = true);
    }

    /// Has the connections of now fall silent for ever without closing them: half-open.
    /// New ones are forwarded.
    pub fn freeze(&self) {
        self.change(|state| state.frozen = state.accepted);
    }

    /// Forwards at most so many bytes a second in each direction.
    pub fn limit(&self, bytes_per_second: u64) {
        self.change(|state| state.limit = Some(bytes_per_second));
    }

    /// Cuts all connections once so many more bytes have been forwarded, in the middle
    /// of whatever they are.
    pub fn cut_after(&self, bytes: u64) {
        self.change(|state| state.cut_at = Some(state.forwarded + bytes));
    }

    /// Makes it a perfect link again.
    pub fn restore(&self) {
        self.change(|state| {
            state.refusing = false;
            state.stalled = false;
            state.limit = None;
            state.cut_at = None;
        });
    }

    /// How many connections have been forwarded since the start.
    pub fn accepted(&self) -> u64 {
        self.shared.state.lock().unwrap().accepted
    }

    /// How many bytes have been forwarded since the start.
    pub fn forwarded(&self) -> u64 {
        self.shared.state.lock().unwrap().forwarded
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
        for (from, to) in [(&client, &server), (&server, &client)] {
            from.set_nodelay(true).ok();
            state.connections.push(from.try_clone().unwrap());
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let shared = Arc::clone(shared);
            std::thread::spawn(move || {
                forward(from, to, number, &shared);
            });
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, number: u64, shared: &Shared) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut state = shared.state.lock().unwrap();
        while (state.stalled || number <= state.frozen) && !state.ended {
            state = shared.changed.wait(state).unwrap();
        }
        let room = state.cut_at.map(|at| at.saturating_sub(state.forwarded));
        let cut = room.is_some_and(|room| room <= count as u64);
        let passed = room.filter(|_| cut).unwrap_or(count as u64);
        state.forwarded += passed;
        let limit = state.limit;
        drop(state);
        if to.write_all(&buffer[..passed as usize]).is_err() {
            break;
        }
        if cut {
            shared.state.lock().unwrap().cut();
            break;
        }
        if let Some(limit) = limit {
            // Taking its time is the very thing that this link is asked to do.
            std::thread::sleep(Duration::from_secs_f64(passed as f64 / limit as f64));
        }
    }
    to.shutdown(Shutdown::Write).ok();
    from.shutdown(Shutdown::Read).ok();
}
