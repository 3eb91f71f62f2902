//! Runs programs with a fixed environment and a time limit, and collects their output. Starts `qemu-io` to hold locks,
//! and servers.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::script::{Server, StockTool, os_word};

/// The paths of the programs.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The installed `qemu-img`.
    pub stock_img: PathBuf,
    /// The installed `qemu-io`.
    pub stock_io: PathBuf,
    /// The `qemu-img` that is compared with it.
    pub under_test: PathBuf,
}

impl Tools {
    /// The path of an installed tool.
    pub fn stock(&self, tool: StockTool) -> &Path {
        match tool {
            StockTool::Img => &self.stock_img,
            StockTool::Io => &self.stock_io,
        }
    }

    /// Whether the harness is being tested with the stock tool against itself.
    pub fn is_self_test(&self) -> bool {
        match (self.stock_img.canonicalize(), self.under_test.canonicalize()) {
            (Ok(stock), Ok(under_test)) => stock == under_test,
            _ => false,
        }
    }
}

/// The result of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `exit code N`, `killed by signal N`, or a text for the time limit.
    pub ending: String,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// Whether the program ended with exit code 0.
    pub fn is_success(&self) -> bool {
        self.ending == SUCCESS
    }
}

/// Runs a program in `directory` under the name `qemu-img` or `qemu-io`, whatever its file is called: messages of
/// getopt have that name.
///
/// # Errors
/// The program cannot be started.
pub fn run(program: &Path, tool: StockTool, args: &[String], directory: &Path) -> Result<Outcome, String> {
    let mut child = command(program, tool, directory)
        .args(args.iter().map(|arg| os_word(arg)))
        .stdin(Stdio::null())
        .spawn()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let ending = wait(&mut child);
    let joined = |reader: thread::JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
    Ok(Outcome {
        ending,
        stdout: joined(stdout),
        stderr: joined(stderr),
    })
}

/// An installed `qemu-io` that keeps an image open until this is dropped.
#[derive(Debug)]
pub struct Holder {
    child: Child,
}

impl Holder {
    /// Starts `qemu-io` and waits until the image is open and its locks are taken.
    ///
    /// # Errors
    /// `qemu-io` does not start or cannot open the image.
    pub fn start(
        tools: &Tools,
        image: &str,
        read_only: bool,
        options: &[String],
        directory: &Path,
    ) -> Result<Self, String> {
        let mut command = command(&tools.stock_io, StockTool::Io, directory);
        command
            .args(options.iter().map(|option| os_word(option)))
            .args(read_only.then_some("-r"))
            .arg(os_word(image))
            .stdin(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|error| format!("{}: {error}", tools.stock_io.display()))?;
        let ready = match (child.stdin.as_mut(), child.stdout.as_mut()) {
            (Some(stdin), Some(stdout)) => {
                // `qemu-io` answers only after it has opened the image.
                let mut answer = String::new();
                stdin.write_all(b"length\n").is_ok()
                    && BufReader::new(stdout)
                        .read_line(&mut answer)
                        .is_ok_and(|length| length > 0)
            }
            _ => false,
        };
        let mut holder = Self { child };
        if ready {
            return Ok(holder);
        }
        let mut said = String::new();
        holder.child.kill().ok();
        if let Some(mut stderr) = holder.child.stderr.take() {
            stderr.read_to_string(&mut said).ok();
        }
        Err(format!("{image} could not be held open: {said}"))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // At the end of its input qemu-io closes the image.
        drop(self.child.stdin.take());
        wait(&mut self.child);
    }
}

/// A server that listens on a socket until this is dropped.
#[derive(Debug)]
pub struct RunningServer {
    child: Child,
    socket: String,
    path: PathBuf,
}

impl RunningServer {
    /// Starts the server and waits until it listens. `{here}` in its arguments is replaced by the directory.
    ///
    /// # Errors
    /// The server does not start.
    pub fn start(server: Server, socket: &str, args: &[String], directory: &Path) -> Result<Self, String> {
        let mut command = Command::new(server.name());
        match server {
            Server::QemuNbd => command
                .args(["--persistent", "--socket"])
                .arg(directory.join(os_word(socket))),
            Server::Nbdkit => command
                .args(["--foreground", "--unix"])
                .arg(directory.join(os_word(socket))),
        };
        let here = directory.to_str().ok_or("a directory whose name is no text")?;
        let child = command
            .args(args.iter().map(|arg| os_word(&arg.replace(HERE, here))))
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("{}: {error}", server.name()))?;
        let mut this = Self {
            child,
            socket: socket.to_owned(),
            path: directory.join(os_word(socket)),
        };
        let start = Instant::now();
        while !is_listening(&this.path)? {
            let ended = this.child.try_wait().map_err(|error| error.to_string())?;
            if ended.is_some() || start.elapsed() > START_LIMIT {
                return Err(format!("{} does not start", server.name()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(this)
    }

    /// The name of the socket.
    pub fn socket(&self) -> &str {
        &self.socket
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        // SIGTERM lets the server flush the image.
        let signalled = Command::new("kill").arg(self.child.id().to_string()).status();
        if !signalled.is_ok_and(|status| status.success()) {
            self.child.kill().ok();
        }
        wait(&mut self.child);
        std::fs::remove_file(&self.path).ok();
    }
}

/// Whether a process listens on `socket`. This makes no connection, since some servers accept only one.
fn is_listening(socket: &Path) -> Result<bool, String> {
    /// The flag `__SO_ACCEPTCON` of the kernel in the table.
    const LISTENS: &[u8] = b"00010000";
    let table = std::fs::read("/proc/net/unix").map_err(|error| error.to_string())?;
    let path = [b" ", socket.as_os_str().as_bytes()].concat();
    // Num RefCount Protocol Flags Type St Inode Path
    let is_it = |line: &[u8]| {
        let mut words = line.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
        words.nth(3) == Some(LISTENS) && line.ends_with(&path)
    };
    Ok(table.split(|byte| *byte == b'\n').any(is_it))
}

fn command(program: &Path, tool: StockTool, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .arg0(match tool {
            StockTool::Img => "qemu-img",
            StockTool::Io => "qemu-io",
        })
        .current_dir(directory)
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .env_remove("POSIXLY_CORRECT")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            pipe.take(OUTPUT_LIMIT).read_to_end(&mut bytes).ok();
        }
        bytes
    })
}

fn wait(child: &mut Child) -> String {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                return match (status.code(), status.signal()) {
                    (Some(0), _) => SUCCESS.to_owned(),
                    (Some(code), _) => format!("exit code {code}"),
                    (None, signal) => format!("killed by signal {}", signal.unwrap_or_default()),
                };
            }
            Ok(None) if start.elapsed() < TIME_LIMIT => thread::sleep(Duration::from_millis(1)),
            Ok(None) | Err(_) => {
                child.kill().ok();
                child.wait().ok();
                return format!("not finished after {} seconds", TIME_LIMIT.as_secs());
            }
        }
    }
}

/// The placeholder for the directory of the case.
const HERE: &str = "{here}";
/// The time in which a server has to listen.
const START_LIMIT: Duration = Duration::from_secs(20);
const SUCCESS: &str = "exit code 0";
/// The time limit of a program. Every case is small: a program that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// The largest output in bytes, so that a program that prints endlessly does not fill the memory.
const OUTPUT_LIMIT: u64 = 16 << 20;
