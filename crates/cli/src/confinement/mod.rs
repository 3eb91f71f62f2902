//! The confinement of the process under `--untrusted`: before the first image is opened, the process gives up everything
//! that the command does not need. What a damaged image may still make of it can then reach no more.
//!
//! ```text
//!   Reach        the files and servers that the user names      reach.rs
//!     │ confine
//!     ├─ Landlock   reads beneath the directories of images, writes beneath those of images that are written   files.rs
//!     └─ seccomp    no programs, no sockets unless the user names a server, no other processes               calls.rs
//! ```
//!
//! When all files are open, [`Confinement::all_open`] takes the right to open files for writing, too: what is left is to give
//! new files their names. Threads that start later inherit all this.

mod calls;
mod files;
mod reach;

use diskimage::{Object, Objects, TlsKind};

use crate::words::Stop;

use files::{Unconfined, Writes};
pub(crate) use reach::Reach;

/// Confines the process to what is in `reach`. No other thread may run yet.
///
/// # Errors
/// The system supports neither kind of confinement, or the command needs another program.
pub(crate) fn confine(reach: Reach, objects: &Objects) -> Result<Confinement, Stop> {
    if objects.iter().any(needs_program) {
        return Err(Stop::wrong(
            "--untrusted starts no programs, which TLS credentials without certificates need",
        ));
    }
    let by_path = files::confine(&reach, Writes::All);
    let by_call = calls::confine(reach.has_network());
    match (by_path, by_call) {
        (Err(path), Err(call)) => Err(Stop::wrong(format!(
            "--untrusted: this system cannot confine a process: {path}; {call}"
        ))),
        _ => Ok(Confinement(Some(reach))),
    }
}

/// A process that is confined, or one that is not.
#[derive(Debug, Default)]
pub(crate) struct Confinement(Option<Reach>);

impl Confinement {
    /// Takes the right to open files for writing, beneath the directories of written images, too. Called when all files of
    /// the command are open.
    ///
    /// # Errors
    /// The system does not confine the process further.
    pub(crate) fn all_open(self) -> Result<(), Stop> {
        match &self.0 {
            // Without Landlock, seccomp is there: see `confine`.
            Some(reach) => files::confine(reach, Writes::Names).or_else(|error| match error {
                Unconfined::NoLandlock => Ok(()),
                other => Err(Stop::wrong(format!("--untrusted: {other}"))),
            }),
            None => Ok(()),
        }
    }
}

fn needs_program(object: &Object) -> bool {
    matches!(object, Object::TlsCreds(creds) if !matches!(creds.kind, TlsKind::X509 { .. }))
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind::PermissionDenied;
    use std::net::UdpSocket;
    use std::path::Path;
    use std::process::Command;
    use std::{env, fs, io};

    use super::*;
    use crate::words::{ImageName, Source};

    /// The directory of the process that confines itself.
    const VARIABLE: &str = "TEST_CONFINED_DIRECTORY";

    fn image(path: &Path) -> Source {
        Source {
            name: ImageName::File(path.display().to_string()),
            format: None,
        }
    }

    fn denied<T>(what: &str, outcome: io::Result<T>) {
        let error = outcome.map(|_| ()).expect_err(what);
        assert_eq!(error.kind(), PermissionDenied, "{what}: {error}");
    }

    /// Run by the other test in a process of its own.
    #[test]
    fn confined() {
        let Some(directory) = env::var_os(VARIABLE) else {
            return;
        };
        let [read, written] = ["read", "written"].map(|name| Path::new(&directory).join(name));
        let objects = Objects::default();
        let reach = Reach::new(&objects)
            .reads(&image(&read.join("image")))
            .writes(&image(&written.join("image")));
        let confinement = confine(reach, &objects).expect("is confined");
        fs::read(read.join("other")).expect("is beneath the directory of an image");
        fs::write(written.join("new"), "x").expect("is beneath that of a written image");
        fs::hard_link(written.join("new"), written.join("name")).expect("is given a name");
        fs::remove_file(written.join("name")).expect("is removed");
        denied(
            "a write beside an image that is read",
            fs::write(read.join("new"), "x"),
        );
        denied("a file elsewhere", fs::read("/etc/passwd"));
        denied(
            "a new file elsewhere",
            fs::write(Path::new(&directory).join("new"), "x"),
        );
        denied("a socket", UdpSocket::bind("127.0.0.1:0"));
        denied("a program", Command::new("/bin/true").status());
        confinement.all_open().expect("is confined further");
        denied("a write to an image", fs::write(written.join("new"), "x"));
        fs::read(written.join("new")).expect("is read");
        fs::rename(written.join("new"), written.join("name")).expect("is given a name");
        std::thread::spawn(|| denied("a file elsewhere, in a thread", fs::read("/etc/passwd")))
            .join()
            .expect("is denied");
    }

    #[test]
    fn a_confined_process_reaches_what_was_named_only() {
        let directory = tempfile::tempdir().expect("is made");
        for name in ["read", "written"] {
            fs::create_dir(directory.path().join(name)).expect("is made");
            fs::write(directory.path().join(name).join("other"), "x").expect("is written");
        }
        let mut other = Command::new(env::current_exe().expect("is known"));
        other.args(["--exact", "confinement::tests::confined", "--nocapture"]);
        let output = other.env(VARIABLE, directory.path()).output().expect("runs");
        let told = String::from_utf8_lossy(&output.stderr);
        let ran = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && ran.contains("1 passed"), "{ran}{told}");
    }
}
