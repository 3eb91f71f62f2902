//! The program between a server of OpenSSL and a client without TLS.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::thread;

use diskimage_protocols::tls_helper::{Answer, NamedKey, Setup};
use openssl::asn1::Asn1Time;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::rsa::Rsa;
use openssl::ssl::{Ssl, SslContext, SslContextBuilder, SslMethod, SslStream};
use openssl::x509::X509;

const KEY: [u8; 16] = [0x5a; 16];

fn key() -> Setup {
    Setup::Key(NamedKey {
        name: b"qemu".to_vec(),
        bytes: KEY.to_vec().into(),
    })
}

/// A running program: it, its plain side, and the socket of the server.
fn start(setup: &Setup) -> (Child, UnixStream, UnixStream) {
    let (server, encrypted) = UnixStream::pair().expect("works");
    let (plain, theirs) = UnixStream::pair().expect("works");
    let child = Command::new(env!("CARGO_BIN_EXE_qemu-img-tls"))
        .stdin(OwnedFd::from(encrypted))
        .stdout(OwnedFd::from(theirs))
        .spawn()
        .expect("works");
    setup.write(&plain).expect("works");
    (child, plain, server)
}

fn server_with_key() -> SslContext {
    let mut context = SslContextBuilder::new(SslMethod::tls_server()).expect("works");
    context.set_psk_server_callback(|_, name, key| {
        assert_eq!(name, Some(&b"qemu"[..]));
        key[..KEY.len()].copy_from_slice(&KEY);
        Ok(KEY.len())
    });
    context.set_cipher_list("PSK").expect("works");
    context.build()
}

fn server_with_certificate() -> SslContext {
    let key = PKey::from_rsa(Rsa::generate(2048).expect("works")).expect("works");
    let mut certificate = X509::builder().expect("works");
    certificate.set_pubkey(&key).expect("works");
    certificate
        .set_not_before(&Asn1Time::days_from_now(0).expect("works"))
        .expect("works");
    certificate
        .set_not_after(&Asn1Time::days_from_now(1).expect("works"))
        .expect("works");
    certificate.sign(&key, MessageDigest::sha256()).expect("works");
    let mut context = SslContextBuilder::new(SslMethod::tls_server()).expect("works");
    context.set_certificate(&certificate.build()).expect("works");
    context.set_private_key(&key).expect("works");
    context.build()
}

fn accept(context: &SslContext, socket: UnixStream) -> io::Result<SslStream<UnixStream>> {
    let mut stream = SslStream::new(Ssl::new(context)?, socket)?;
    stream.accept().map_err(io::Error::other)?;
    Ok(stream)
}

#[test]
fn bytes_cross_in_both_directions_until_the_client_ends() {
    let (mut child, plain, socket) = start(&key());
    let server = thread::spawn(move || {
        let mut stream = accept(&server_with_key(), socket).unwrap();
        stream.write_all(b"greeting").unwrap();
        let mut chunk = vec![0; 100_000];
        let mut total = 0;
        loop {
            match stream.read(&mut chunk) {
                // The connection ends as qemu-img ends its own: without a close alert.
                Ok(0) | Err(_) => return total,
                Ok(len) => stream.write_all(&chunk[..len]).unwrap(),
            }
            total += 1;
        }
    });
    assert_eq!(Answer::read(&plain).unwrap(), Answer::Secured);
    let mut greeting = [0; 8];
    (&plain).read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"greeting");
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let mut back = vec![0; sent.len()];
    thread::scope(|scope| {
        scope.spawn(|| (&plain).write_all(&sent).unwrap());
        (&plain).read_exact(&mut back).unwrap();
    });
    assert!(back == sent, "other bytes came back");
    plain.shutdown(Shutdown::Both).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(server.join().unwrap() > 0);
}

#[test]
fn a_server_that_ends_ends_the_client() {
    let (mut child, plain, socket) = start(&key());
    let server = thread::spawn(move || {
        let mut stream = accept(&server_with_key(), socket).unwrap();
        stream.write_all(b"farewell").unwrap();
    });
    assert_eq!(Answer::read(&plain).unwrap(), Answer::Secured);
    let mut rest = Vec::new();
    (&plain).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"farewell");
    assert!(child.wait().unwrap().success());
    server.join().unwrap();
}

#[test]
fn failed_handshakes_are_told_apart() {
    // A certificate instead of the key.
    let (mut child, plain, socket) = start(&key());
    let server = thread::spawn(move || accept(&server_with_certificate(), socket).is_err());
    assert_eq!(Answer::read(&plain).unwrap(), Answer::Insufficient);
    assert!(server.join().unwrap());
    assert!(child.wait().unwrap().success());
    // No cipher in common.
    let (mut child, plain, socket) = start(&Setup::Anonymous);
    let server = thread::spawn(move || accept(&server_with_certificate(), socket).is_err());
    assert_eq!(Answer::read(&plain).unwrap(), Answer::Alert);
    assert!(server.join().unwrap());
    assert!(child.wait().unwrap().success());
    // Nobody there.
    let (mut child, plain, socket) = start(&Setup::Anonymous);
    drop(socket);
    assert_eq!(Answer::read(&plain).unwrap(), Answer::EndedUnanswered);
    assert!(child.wait().unwrap().success());
}
