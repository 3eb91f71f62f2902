//! What every command has to keep to.

use crate::commands::Command;
use crate::process::Spent;

/// The most bytes of standard output and standard error: so many, and so many for each byte that the image's files have in
/// the file system. Lists have a line for each of their members, and JSON escapes a byte as six.
const OUTPUT: u64 = 1 << 20;
const OUTPUT_OF_A_BYTE: u64 = 32;
/// The most lines of standard error.
const ERROR_LINES: usize = 2100;
/// The ends that commands have: done, failed, and those of `check` and `compare`.
const EXIT_CODES: [i32; 6] = [0, 1, 2, 3, 4, 63];

/// What is wrong with how a command has ended, if anything is. The files of its image have `stored` bytes in the file
/// system.
pub(crate) fn judge(command: &Command, spent: &Spent, stored: u64) -> Vec<String> {
    let mut faults = Vec::new();
    if spent.is_overdue {
        faults.push(format!("not finished after {:.0?}", spent.wall));
    } else if let Some(signal) = spent.signal() {
        faults.push(format!("ended by signal {signal} after {:.1?} of CPU", spent.cpu));
    } else if !spent.status.code().is_some_and(|code| EXIT_CODES.contains(&code)) {
        faults.push(format!("{}", spent.status));
    }
    if spent.cpu.as_secs() >= command.cpu {
        faults.push(format!("{:.1?} of CPU", spent.cpu));
    }
    if spent.memory >= command.memory {
        faults.push(format!("{} MiB resident", spent.memory >> 20));
    }
    if command.short && spent.output > OUTPUT + stored * OUTPUT_OF_A_BYTE {
        faults.push(format!("{} KiB of output", spent.output >> 10));
    }
    let text = String::from_utf8_lossy(&spent.stderr);
    if text.contains("panicked") {
        faults.push("panicked".to_owned());
    }
    let lines = text.lines().count();
    let out_of_memory = text.contains("Cannot allocate memory") || text.contains("memory allocation");
    if lines > ERROR_LINES || (out_of_memory && spent.status.code() == Some(1) && lines > 1) {
        faults.push(format!("{lines} lines on standard error"));
    }
    faults
}
