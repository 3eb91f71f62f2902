//! The connections to an export: one, or several if the server allows it and there is work for them.
//!
//! The first connection is made when the export is opened. When requests pile up on all that there are, another one is
//! made on the side, up to [`MAX_CONNECTIONS`]; nobody waits for it, since a server may have said that it takes several and
//! not take this one. A connection that is lost is replaced for as long as `reconnect-delay` says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use super::address::Socket;
use super::connection::Connection;
use super::negotiate::Export;
use super::remote::Remote;
use super::wire::export;

/// The connections to an export.
#[derive(Debug)]
pub(super) struct ConnectionPool {
    inner: Arc<Inner>,
    /// How long to wait for a connection that was lost to come back.
    patience: Duration,
    /// Held by who replaces a lost connection.
    repair: Mutex<()>,
}

#[derive(Debug)]
struct Inner {
    remote: Remote,
    export: Export,
    connections: RwLock<Vec<Arc<Connection>>>,
    growing: Mutex<Growing>,
    /// To end the handshake of a connection that is being made.
    handle: Mutex<Option<Socket>>,
}

#[derive(Debug, Default)]
struct Growing {
    /// A connection is being made, or none is wanted any more.
    busy: bool,
    closed: bool,
}

/// The most connections to one export: more do not make a server faster.
const MAX_CONNECTIONS: usize = 4;
/// How many requests wait on each connection before another one is made.
const BUSY_REQUESTS: usize = 3;
/// How long to wait between two attempts to connect again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

impl ConnectionPool {
    /// Starts with the first connection.
    pub(super) fn new(remote: Remote, first: Connection, patience: Duration) -> Self {
        let export = first.export().clone();
        Self {
            inner: Arc::new(Inner {
                remote,
                export,
                connections: RwLock::new(vec![Arc::new(first)]),
                growing: Mutex::default(),
                handle: Mutex::new(None),
            }),
            patience,
            repair: Mutex::new(()),
        }
    }

    /// The export that all connections agreed on.
    pub(super) fn export(&self) -> &Export {
        &self.inner.export
    }

    /// The connection with the least to do, or none if all are lost.
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

    /// Makes another connection on the side.
    fn grow(&self) {
        {
            let mut growing = self.inner.growing();
            if growing.busy || growing.closed {
                return;
            }
            growing.busy = true;
        }
        let inner = Arc::clone(&self.inner);
        // Without a thread there is simply no other connection.
        let _ = thread::Builder::new().name("nbd".to_owned()).spawn(move || {
            let outcome = inner.remote.connect(&inner.handle);
            let Ok(connection) = outcome else {
                // Still busy: a server that does not want another one is not asked again.
                return;
            };
            let mut growing = inner.growing();
            if !growing.closed && *connection.export() == inner.export {
                growing.busy = false;
                inner.add(connection);
            }
        });
    }

    /// Whether there is a connection again after `lost` was lost.
    pub(super) fn replace(&self, lost: Option<&Arc<Connection>>) -> bool {
        let deadline = Instant::now() + self.patience;
        let _alone = self.repair.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lost) = lost {
            let mut connections = self
                .inner
                .connections
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            connections.retain(|connection| !Arc::ptr_eq(connection, lost) && !connection.is_lost());
        }
        if self.patience.is_zero() {
            return false;
        }
        let there = !self
            .inner
            .connections
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty();
        if there {
            return true;
        }
        loop {
            match self.inner.remote.connect(&Mutex::new(None)) {
                Ok(connection) if *connection.export() == self.inner.export => {
                    self.inner.add(connection);
                    return true;
                }
                // Another export by the same name: its bytes are not those that were there.
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
