//! Tests of the client with a conforming server.

use std::thread;
use std::time::Duration;

use diskimage_core::{ByteRange, Device, ExtentKind, Preallocation, StatusDetail, ZeroMode};

use super::server::{Behaviour, Rule, Server};

fn all_reply_modes() -> [Behaviour; 3] {
    let extended = Behaviour::default();
    let structured = Behaviour {
        extended: false,
        ..extended.clone()
    };
    let simple = Behaviour {
        structured: false,
        ..structured.clone()
    };
    [extended, structured, simple]
}

#[test]
fn written_data_is_read_back_in_every_reply_mode() {
    for behaviour in all_reply_modes() {
        let server = Server::start(behaviour);
        let device = server.open().unwrap();
        let bytes: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        device.write_at(&bytes, 1234).unwrap();
        let mut back = vec![0; bytes.len()];
        device.read_at(&mut back, 1234).unwrap();
        assert!(back == bytes);
        assert!(server.bytes()[1234..][..bytes.len()] == bytes);
        device
            .write_zeroes(ByteRange::at(2000, 1000), ZeroMode::Unmap)
            .unwrap();
        device.discard(ByteRange::at(5000, 1000)).unwrap();
        device.flush().unwrap();
        assert!(server.bytes()[2000..3000].iter().all(|byte| *byte == 0));
        assert!(server.bytes()[5000..6000].iter().all(|byte| *byte == 0));
        assert_eq!((server.count(3), server.count(4), server.count(6)), (1, 1, 1));
    }
}

#[test]
fn partial_writes_read_the_block_first() {
    let server = Server::start(Behaviour {
        min_block: 4096,
        ..Behaviour::default()
    });
    let device = server.open().unwrap();
    device.write_at(&[1; 4096 * 3], 0).unwrap();
    device.write_at(&[2; 5000], 100).unwrap();
    device
        .write_zeroes(ByteRange::at(4000, 5000), ZeroMode::KeepAllocated)
        .unwrap();
    let mut expected = vec![1; 4096 * 3];
    expected[100..5100].fill(2);
    expected[4000..9000].fill(0);
    assert!(server.bytes()[..expected.len()] == expected);
    let mut part = [0; 10];
    device.read_at(&mut part, 95).unwrap();
    assert_eq!(part, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]);
    // Only whole blocks can be discarded.
    device.discard(ByteRange::at(1, 4096)).unwrap();
    assert!(server.bytes()[..100] == expected[..100]);
}

#[test]
fn partial_writes_of_one_block_by_several_threads_are_all_kept() {
    let server = Server::start(Behaviour {
        min_block: 4096,
        ..Behaviour::default()
    });
    let device = server.open().unwrap();
    thread::scope(|scope| {
        for n in 0..8_u8 {
            let device = &device;
            scope.spawn(move || {
                for round in 0..16 {
                    device
                        .write_at(&[n + 1; 16], u64::from(n) * 16 + round * 128)
                        .unwrap();
                }
            });
        }
    });
    let bytes = server.bytes();
    for (at, byte) in bytes[..2048].iter().enumerate() {
        assert_eq!(usize::from(*byte), at % 128 / 16 + 1);
    }
}

#[test]
fn status_is_cached_until_a_write() {
    for behaviour in &all_reply_modes()[..2] {
        let server = Server::start(behaviour.clone());
        let device = server.open().unwrap();
        device.write_at(&[1; 4096], 8192).unwrap();
        let runs = |device: &dyn Device| {
            let mut rest = ByteRange::new(0, device.len());
            let mut runs = Vec::new();
            while !rest.is_empty() {
                let extent = device.status(rest, StatusDetail::Zeroes).unwrap();
                runs.push((extent.len, extent.kind));
                rest = rest.skip(extent.len);
            }
            runs
        };
        let expected = [
            (8192, ExtentKind::Zero),
            (4096, ExtentKind::Data),
            ((1 << 20) - 12288, ExtentKind::Zero),
        ];
        assert_eq!(runs(&device), expected);
        assert_eq!(server.count(7), 1);
        device.write_at(&[1; 4096], 0).unwrap();
        assert_eq!(runs(&device).len(), 4);
        assert_eq!(server.count(7), 2);
    }
}

#[test]
fn without_block_status_everything_is_data() {
    let [_, _, simple] = all_reply_modes();
    let server = Server::start(simple);
    let device = server.open().unwrap();
    let extent = device
        .status(ByteRange::new(512, 1 << 20), StatusDetail::Zeroes)
        .unwrap();
    assert_eq!((extent.len, extent.kind), ((1 << 20) - 512, ExtentKind::Data));
}

#[test]
fn fast_zeroes_are_fast_or_fail() {
    let without = Behaviour {
        flags: Behaviour::default().flags & !(1 << 11),
        ..Behaviour::default()
    };
    let server = Server::start(without);
    let device = server.open().unwrap();
    let range = ByteRange::at(0, 4096);
    let error = device.write_zeroes(range, ZeroMode::FastOnly).unwrap_err();
    assert_eq!(error.kind(), diskimage_core::ErrorKind::Unsupported);
    assert_eq!(server.requests(), 0);
    let refusing = Behaviour {
        rule: Some(Rule::FailAt(0, 95)),
        ..Behaviour::default()
    };
    let server = Server::start(refusing);
    let device = server.open().unwrap();
    let error = device.write_zeroes(range, ZeroMode::FastOnly).unwrap_err();
    assert_eq!(error.kind(), diskimage_core::ErrorKind::Unsupported);
    device.write_zeroes(range, ZeroMode::FastOnly).unwrap();
}

#[test]
fn zeroes_are_written_as_bytes_if_the_server_has_no_command_for_them() {
    let server = Server::start(Behaviour {
        flags: 1,
        ..Behaviour::default()
    });
    let device = server.open().unwrap();
    device.write_at(&[1; 200_000], 0).unwrap();
    device
        .write_zeroes(ByteRange::at(10, 150_000), ZeroMode::Unmap)
        .unwrap();
    device.discard(ByteRange::at(0, 4096)).unwrap();
    device.flush().unwrap();
    assert!(server.bytes()[10..150_010].iter().all(|byte| *byte == 0));
    assert_eq!((server.count(3), server.count(4), server.count(6)), (0, 0, 0));
}

#[test]
fn an_export_has_a_fixed_length_and_checks_bounds() {
    let server = Server::start(Behaviour::default());
    let device = server.open().unwrap();
    device.resize(1 << 20, Preallocation::Off).unwrap();
    let error = device.resize(1 << 21, Preallocation::Off).unwrap_err();
    assert_eq!(error.chain(), "Cannot resize NBD nodes");
    assert!(device.read_at(&mut [0; 2], (1 << 20) - 1).is_err());
    assert!(device.write_at(&[0; 2], u64::MAX).is_err());
    assert_eq!(server.requests(), 0);
}

#[test]
fn a_partial_last_block_is_read_and_written() {
    for (len, min_block) in [(10_000, 512), (5000, 1 << 16), (5000, 4096), (100, 1 << 16)] {
        let server = Server::start(Behaviour {
            len,
            min_block,
            ..Behaviour::default()
        });
        let device = server.open().unwrap();
        assert_eq!(device.len(), len);
        let bytes: Vec<u8> = (0..len).map(|n| (n % 251).to_le_bytes()[0] + 1).collect();
        device.write_at(&bytes, 0).unwrap();
        assert!(server.bytes()[..bytes.len()] == bytes);
        let mut back = vec![0; bytes.len()];
        device.read_at(&mut back, 0).unwrap();
        assert!(back == bytes);
        let mut last = [0; 3];
        device.read_at(&mut last, len - 3).unwrap();
        assert_eq!(last, bytes[bytes.len() - 3..]);
        device.write_at(&[7], len - 2).unwrap();
        device
            .write_zeroes(ByteRange::new(len - 1, len), ZeroMode::Unmap)
            .unwrap();
        assert_eq!(server.bytes()[bytes.len() - 3..bytes.len()], [last[0], 7, 0]);
        device.discard(ByteRange::new(0, len)).unwrap();
        let mut rest = ByteRange::new(0, len);
        while !rest.is_empty() {
            rest = rest.skip(device.status(rest, StatusDetail::Zeroes).unwrap().len);
        }
        device
            .write_zeroes(ByteRange::new(0, len), ZeroMode::Unmap)
            .unwrap();
        assert!(server.bytes()[..bytes.len()].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_server_that_refuses_a_partial_last_block_fails_the_request() {
    let server = Server::start(Behaviour {
        len: 5000,
        min_block: 4096,
        rule: Some(Rule::FailAt(0, 22)),
        ..Behaviour::default()
    });
    let device = server.open().unwrap();
    let error = device.read_at(&mut [0; 5000], 0).unwrap_err();
    assert_eq!(error.chain(), "Invalid argument");
}

#[test]
fn read_only_exports_are_not_opened_for_writing() {
    let server = Server::start(Behaviour {
        flags: 1 | 1 << 1,
        ..Behaviour::default()
    });
    assert_eq!(
        server.open().map(|_| ()).map_err(|error| error.chain()),
        Err("Could not open image: Permission denied".to_owned())
    );
}

fn hammer(device: &dyn Device) {
    thread::scope(|scope| {
        for n in 0..16_u8 {
            scope.spawn(move || {
                let at = u64::from(n) * 65536;
                for _ in 0..20 {
                    device.write_at(&[n; 65536], at).unwrap();
                    let mut back = vec![0; 65536];
                    device.read_at(&mut back, at).unwrap();
                    assert!(back.iter().all(|byte| *byte == n));
                }
            });
        }
    });
}

#[test]
fn many_threads_share_connections_that_are_made_as_needed() {
    let server = Server::start(Behaviour::default());
    let device = server.open().unwrap();
    hammer(&device);
    assert!(server.connections() > 1);
    drop(device);
    let alone = Behaviour {
        flags: Behaviour::default().flags & !(1 << 8),
        ..Behaviour::default()
    };
    let server = Server::start(alone);
    hammer(&server.open().unwrap());
    assert_eq!(server.connections(), 1);
}

#[test]
fn a_server_that_refuses_a_second_connection_still_works() {
    let server = Server::start(Behaviour {
        rule: Some(Rule::OnlyOne),
        ..Behaviour::default()
    });
    let device = server.open().unwrap();
    hammer(&device);
    drop(device);
}

#[test]
fn a_lost_connection_is_replaced_if_reconnect_delay_is_set() {
    let server = Server::start(Behaviour {
        rule: Some(Rule::VanishAt(1)),
        ..Behaviour::default()
    });
    let mut options = server.options();
    options.set("reconnect-delay", "10");
    let device = super::super::Nbd::open(&mut options, true, &diskimage_core::Objects::new()).unwrap();
    device.write_at(&[1; 512], 0).unwrap();
    device.write_at(&[2; 512], 512).unwrap();
    assert_eq!(server.bytes()[511..513], [1, 2]);
    assert_eq!(server.connections(), 2);
}

#[test]
fn opening_retries_until_the_server_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut options = diskimage_core::NodeOptions::new();
    options.set("path", path.to_str().unwrap());
    options.set("open-timeout", "20");
    let server = Server::start(Behaviour::default());
    let there = server.options().take_text("path").unwrap();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        std::os::unix::fs::symlink(there, path).unwrap();
    });
    super::super::Nbd::open(&mut options, true, &diskimage_core::Objects::new()).unwrap();
}
