//! Confinement of system calls, by seccomp: those in the list are made, all others fail with `EPERM`.
//!
//! The list is that of a program that reads and writes files with several threads: no other programs, no sockets, no other
//! processes, no change of the own privileges. Landlock decides which files are opened.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

/// Confines the process to the calls of the list, those for sockets included if `network` says so.
///
/// # Errors
/// What is missing.
pub(super) fn confine(network: bool) -> Result<(), String> {
    for filter in [without_clone3(), listed(network)] {
        let filter = filter.map_err(|error| format!("seccomp: {error}"))?;
        apply_filter_all_threads(&filter).map_err(|error| format!("no seccomp: {error}"))?;
    }
    Ok(())
}

/// Pretends that the kernel does not know `clone3`, whose flags no filter sees: the C library uses `clone` instead.
fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let unknown = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    SeccompFilter::new(rules, SeccompAction::Allow, unknown, arch()?)?.try_into()
}

fn arch() -> Result<TargetArch, seccompiler::BackendError> {
    TargetArch::try_from(std::env::consts::ARCH)
}

fn listed(network: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let sockets = SOCKETS.iter().filter(|_| network);
    let always = FILES
        .iter()
        .chain(OLD_FILES)
        .chain(MEMORY_AND_THREADS)
        .chain(sockets);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = always.map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_clone, vec![starting_a_thread()?]);
    rules.insert(libc::SYS_ioctl, vec![harmless_ioctl()?]);
    rules.insert(
        libc::SYS_prctl,
        vec![prctl(PR_SET_VMA)?, prctl(PR_SET_NO_NEW_PRIVS)?],
    );
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    SeccompFilter::new(rules, refused, SeccompAction::Allow, arch()?)?.try_into()
}

/// `clone` for a thread: neither for another process nor for one with namespaces of its own.
fn starting_a_thread() -> Result<SeccompRule, seccompiler::BackendError> {
    let bits = |flags: i32| u64::from(flags.cast_unsigned());
    let is_thread = SeccompCmpOp::MaskedEq(bits(libc::CLONE_THREAD | NEW_NAMESPACES));
    let flags = SeccompCondition::new(0, SeccompCmpArgLen::Qword, is_thread, bits(libc::CLONE_THREAD))?;
    SeccompRule::new(vec![flags])
}

const NEW_NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP;

/// All requests but those that type into the terminal, as its user would.
fn harmless_ioctl() -> Result<SeccompRule, seccompiler::BackendError> {
    let except = |request: u64| SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, request);
    SeccompRule::new(vec![except(TIOCSTI)?, except(TIOCLINUX)?])
}

/// Types a character.
const TIOCSTI: u64 = 0x5412;

/// Pastes a selection.
const TIOCLINUX: u64 = 0x541c;

/// The request `request` of `prctl`.
fn prctl(request: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let is_it = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request)?;
    SeccompRule::new(vec![is_it])
}

/// Allocators name their memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// Comes before each further confinement.
const PR_SET_NO_NEW_PRIVS: u64 = 38;

const FILES: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    #[cfg(not(target_arch = "riscv64"))]
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_io_setup,
    libc::SYS_io_destroy,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_ppoll,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
];

/// Older calls for the same, which not every machine has.
#[cfg(target_arch = "x86_64")]
const OLD_FILES: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_link,
    libc::SYS_rename,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_time,
    libc::SYS_getrlimit,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD_FILES: &[c_long] = &[];

const MEMORY_AND_THREADS: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_clone3,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_prlimit64,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// For an image or target on a server that the user names.
const SOCKETS: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
];
