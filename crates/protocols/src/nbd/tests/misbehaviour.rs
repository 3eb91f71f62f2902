//! Tests of the client with servers that fail, disconnect, or send garbage: every request ends, with an error where it
//! should.

use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use diskimage_core::{ByteRange, Device, Result, StatusDetail, ZeroMode};

use super::server::{Behaviour, Rule, Server};

/// A request that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Sends one request of each kind. Returns how many succeeded.
fn exercise(device: &dyn Device) -> usize {
    let mut buf = vec![0; 100_000];
    let results: [Result<()>; 6] = [
        device.write_at(&[1; 100_000], 0),
        device.read_at(&mut buf, 0),
        device.write_zeroes(ByteRange::at(0, 4096), ZeroMode::Unmap),
        device
            .status(ByteRange::new(0, 1 << 20), StatusDetail::Zeroes)
            .map(|_| ()),
        device.discard(ByteRange::at(0, 4096)),
        device.flush(),
    ];
    results.iter().filter(|result| result.is_ok()).count()
}

/// Runs the requests with a server of this behaviour. Returns how many succeeded, and how many the server received.
fn outcome(behaviour: Behaviour) -> (usize, usize) {
    let (told, heard) = channel();
    thread::spawn(move || {
        let server = Server::start(behaviour);
        let device = server.open().unwrap();
        let good = exercise(&device);
        drop(device);
        told.send((good, server.requests())).unwrap();
    });
    heard
        .recv_timeout(LIMIT)
        .expect("nothing hangs and nothing panics")
}

fn forms() -> [Behaviour; 2] {
    let extended = Behaviour::default();
    let structured = Behaviour {
        extended: false,
        ..extended.clone()
    };
    [extended, structured]
}

/// Requests of one run: two for the write, two for the read, and one for each other.
const REQUESTS: usize = 8;

#[test]
fn all_requests_succeed_without_faults() {
    for behaviour in forms() {
        assert_eq!(outcome(behaviour), (6, REQUESTS));
    }
}

#[test]
fn each_error_reply_fails_one_request() {
    for behaviour in forms() {
        for n in 0..REQUESTS {
            let (good, _) = outcome(Behaviour {
                rule: Some(Rule::FailAt(n, 28)),
                ..behaviour.clone()
            });
            assert_eq!(good, 5, "request {n}");
        }
    }
}

#[test]
fn a_server_that_disconnects_fails_later_requests() {
    for behaviour in forms() {
        for n in 0..REQUESTS {
            let (good, seen) = outcome(Behaviour {
                rule: Some(Rule::VanishAt(n)),
                ..behaviour.clone()
            });
            assert_eq!(seen, n + 1);
            assert!(good < 6, "request {n}");
        }
    }
}

#[test]
fn garbage_ends_the_connection() {
    const RUBBISH: [&[u8]; 4] = [
        &[0; 64],
        &[0xff; 64],
        // A reply to a request that was never sent, in both encodings.
        b"\x6e\x8a\x27\x8c\0\x01\0\0\0\0\0\0\0\0\x99\x99\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\x99\x99\0\0\0\0",
    ];
    for behaviour in forms() {
        for bytes in RUBBISH {
            for n in [0, 2, 5] {
                let (good, _) = outcome(Behaviour {
                    rule: Some(Rule::Rubbish(n, bytes)),
                    ..behaviour.clone()
                });
                assert!(good < 6, "request {n}");
            }
        }
    }
}

#[test]
fn errors_are_those_of_the_system() {
    let server = Server::start(Behaviour {
        rule: Some(Rule::FailAt(0, 28)),
        ..Behaviour::default()
    });
    let device = server.open().unwrap();
    let error = device.write_at(&[1; 10], 0).unwrap_err();
    assert_eq!(error.chain(), "No space left on device");
    assert_eq!(error.kind(), diskimage_core::ErrorKind::NoSpace);
    let server = Server::start(Behaviour {
        rule: Some(Rule::VanishAt(0)),
        ..Behaviour::default()
    });
    let device = server.open().unwrap();
    let error = device.write_at(&[1; 10], 0).unwrap_err();
    assert_eq!(error.chain(), "Input/output error");
}
