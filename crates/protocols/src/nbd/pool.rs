//! The connections to an export: one, or several if the server allows it and there are enough requests.
//!
//! The first connection is made when the export is opened. When all are busy, a thread makes another one, up to
//! [`MAX_CONNECTIONS`]. Requests do not wait for it: a server may announce that it accepts several connections and then
//! refuse one. A lost connection is replaced for the time of `reconnect-delay`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use super::address::Socket;
use super::connection::Connection;
use super::negotiate::Export;
use super::remote::Remote;
use super::wire::export;
use diskimage_core::thread_builder;

/// The connections to an export.
#[derive(Debug)]
pub(super) struct ConnectionPool {
    inner: Arc<Inner>,
    /// For how long to try to replace a lost connection.
    reconnect_delay: Duration,
    /// Held while a lost connection is replaced.
    repair: Mutex<()>,
}

#[derive(Debug)]
struct Inner {
    remote: Remote,
    export: Export,
    connections: RwLock<Vec<Arc<Connection>>>,
    growing: Mutex<Growing>,
    /// The socket of a handshake in progress, to shut it down.
    handle: Mutex<Option<Socket>>,
}

#[derive(Debug, Default)]
struct Growing {
    /// A connection is being made, or the server has refused one.
    busy: bool,
    closed: bool,
}

/// The limit of connections to one export: more do not make a server faster.
const MAX_CONNECTIONS: usize = 4;
/// How many requests in flight make a connection busy.
const BUSY_REQUESTS: usize = 3;
/// How long to wait between two attempts to connect again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

impl ConnectionPool {
    /// A pool of one connection.
    pub(super) fn new(remote: Remote, first: Connection, reconnect_delay: Duration) -> Self {
        let export = first.export().clone();
        Self {
            inner: Arc::new(Inner {
                remote,
                export,
                connections: RwLock::new(vec![Arc::new(first)]),
                growing: Mutex::default(),
                handle: Mutex::new(None),
            }),
            reconnect_delay,
            repair: Mutex::new(()),
        }
    }

    /// The export that all connections have negotiated.
    pub(super) fn export(&self) -> &Export {
        &self.inner.export
    }

    /// The connection with the fewest requests in flight; `None` if all are lost.
    pub(super) fn pick(&self) -> Option<Arc<Connection>> {
        let (best, count) = {
            let connections = self
                .inner
                .connections
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            let best = connections
                .iter()
                .min_by_key(|connection| connection.in_flight())
                .cloned();
            (best, connections.len())
        };
        let best = best?;
        if best.in_flight() >= BUSY_REQUESTS
            && count < MAX_CONNECTIONS
            && self.export().flags & export::MULTI_CONN != 0
        {
            self.grow();
        }
        Some(best)
    }

    /// Starts a thread that makes another connection.
    fn grow(&self) {
        {
            let mut growing = self.inner.growing();
            if growing.busy || growing.closed {
                return;
            }
            growing.busy = true;
        }
        let inner = Arc::clone(&self.inner);
        // Without the thread there is no other connection.
        let Ok(builder) = thread_builder() else { return };
        let _ = builder.name("nbd".to_owned()).spawn(move || {
            let outcome = inner.remote.connect(&inner.handle);
            let Ok(connection) = outcome else {
                // Still busy: after a refusal the server is not asked again.
                return;
            };
            let mut growing = inner.growing();
            if !growing.closed && *connection.export() == inner.export {
                growing.busy = false;
                inner.add(connection);
            }
        });
    }

    /// Replaces `lost`. Returns whether there is a connection again.
    pub(super) fn replace(&self, lost: Option<&Arc<Connection>>) -> bool {
        let deadline = Instant::now() + self.reconnect_delay;
        let _alone = self.repair.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lost) = lost {
            let mut connections = self
                .inner
                .connections
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            connections.retain(|connection| !Arc::ptr_eq(connection, lost) && !connection.is_lost());
        }
        if self.reconnect_delay.is_zero() {
            return false;
        }
        let is_connected = !self
            .inner
            .connections
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty();
        if is_connected {
            return true;
        }
        loop {
            match self.inner.remote.connect(&Mutex::new(None)) {
                Ok(connection) if *connection.export() == self.inner.export => {
                    self.inner.add(connection);
                    return true;
                }
                // The export with this name has changed: its data is not that of the old one.
                Ok(_) => return false,
                Err(_) if Instant::now() + RETRY_PAUSE >= deadline => return false,
                Err(_) => thread::sleep(RETRY_PAUSE),
            }
        }
    }
}

impl Inner {
    fn growing(&self) -> MutexGuard<'_, Growing> {
        self.growing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, connection: Connection) {
        self.connections
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::new(connection));
    }
}

impl Drop for ConnectionPool {
    fn drop(&mut self) {
        self.inner.growing().closed = true;
        let handle = self.inner.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = &*handle {
            socket.shut_down();
        }
        drop(handle);
        self.inner
            .connections
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}
