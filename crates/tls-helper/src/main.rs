//! The program `qemu-img-tls`: TLS with a pre-shared key, or anonymous, for the NBD client of `qemu-img`.
//!
//! Standard input is the connection to the server, and standard output is a socket to `qemu-img`; users do not start it.
//! It exists so that `qemu-img` need not load OpenSSL, which takes longer than most of its commands.
//!
//! ```text
//!   main ── Setup, Answer ──► helper   the messages of the start (diskimage_protocols::tls_helper)
//!    ├ session                         a session of OpenSSL between two buffers
//!    └ relay                           the bytes between the two sockets
//! ```

mod relay;
mod session;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use diskimage_protocols::tls_helper::{Answer, Setup};

use session::Session;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // Either side has gone, or this was started by hand; the other one sees the end of its socket.
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> io::Result<()> {
    let server = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let client = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    // Without a buffer, since plain bytes may follow at once.
    let setup = Setup::read(&client)?;
    let mut session = match Session::new(setup).and_then(|mut session| {
        shake_hands(&mut session, &server)?;
        Ok(session)
    }) {
        Ok(session) => session,
        Err(answer) => return answer.write(&client),
    };
    Answer::Secured.write(&client)?;
    relay::run(&mut session, &server, &client)
}

/// How many bytes are read at once.
const CHUNK: usize = 64 << 10;

fn shake_hands(session: &mut Session, mut server: &File) -> Result<(), Answer> {
    let mut raw = vec![0; CHUNK];
    let mut was_answered = false;
    loop {
        server
            .write_all(&session.drain())
            .map_err(|error| broken_off(&error, was_answered))?;
        if !session.is_handshaking() {
            return Ok(());
        }
        let len = read(server, &mut raw).map_err(|error| broken_off(&error, was_answered))?;
        if len == 0 {
            return Err(broken_off(&io::ErrorKind::UnexpectedEof.into(), was_answered));
        }
        was_answered = true;
        if let Err(answer) = session.feed(&raw[..len]) {
            // Send the alert.
            let _ = server.write_all(&session.drain());
            return Err(answer);
        }
    }
}

fn read(mut from: &File, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buf) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// A connection that ends during the handshake.
fn broken_off(error: &io::Error, was_answered: bool) -> Answer {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            if was_answered {
                Answer::Ended
            } else {
                Answer::EndedUnanswered
            }
        }
        _ => Answer::Failed(error.to_string()),
    }
}
