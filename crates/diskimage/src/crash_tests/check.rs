//! `check -r`: the guest data is kept, and a repair that was cut off is completed by the next one.

use diskimage_core::{Error, Progress, Repair, Result};

use super::disks::{Disks, Files, ImagePlan, make};
use super::{Command, Least, try_all};
use crate::OpenOptions;

const KIB: u64 = 1024;
const CLUSTER: usize = 4096;

/// The command: a repair, and a check that finds nothing more.
fn repair(repair: Repair) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let image = disks.open("top", OpenOptions::new().for_check(true).write(true))?;
        let check = |repair| image.layer().check(repair, &Progress::none());
        check(repair)?;
        let left = check(Repair::No)?;
        match (left.corruptions, left.check_errors, left.leaks) {
            (0, 0, 0) => Ok(()),
            _ => Err(Error::invalid(format!("not repaired: {left:?}"))),
        }
    }
}

/// The host offset in the table entry at `at`.
fn entry_offset(file: &[u8], at: usize) -> usize {
    let bytes = file[at..at + 8].try_into().expect("eight");
    usize::try_from(u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00).expect("small")
}

/// The header's offsets of the L1 table and of the refcount table.
const L1_TABLE: usize = 40;
const REFCOUNT_TABLE: usize = 48;

/// The host offset of a guest cluster.
fn host_offset(file: &[u8], cluster: usize) -> usize {
    let l2 = entry_offset(file, entry_offset(file, L1_TABLE));
    entry_offset(file, l2 + cluster * 8)
}

fn set_refcount(file: &mut [u8], offset: usize, count: u8) {
    let block = entry_offset(file, entry_offset(file, REFCOUNT_TABLE));
    let at = block + offset / CLUSTER * 2;
    file[at..at + 2].copy_from_slice(&[0, count]);
}

/// Leaks three clusters at the end of the file, and one reference of a data cluster.
fn leak(file: &mut Vec<u8>) {
    let end = file.len().next_multiple_of(CLUSTER);
    file.resize(end + 3 * CLUSTER, 0x55);
    for cluster in 0..3 {
        set_refcount(file, end + cluster * CLUSTER, 1);
    }
    let shared = host_offset(file, 2);
    set_refcount(file, shared, 2);
}

/// Sets the refcounts of three data clusters to 0.
fn lose_refcounts(file: &mut [u8]) {
    for cluster in [0, 3, 5] {
        let offset = host_offset(file, cluster);
        set_refcount(file, offset, 0);
    }
}

/// Sets the dirty bit of the header, as in an image that was not closed.
fn make_dirty(file: &mut [u8]) {
    file[79] |= 1;
    lose_refcounts(file);
}

fn files(options: &'static str, damage: fn(&mut Vec<u8>)) -> Files {
    let mut files = make(&[ImagePlan::qcow2(options, 96 * KIB)
        .data(0, 40_000, 1)
        .snapshot("old")
        .data(20_000, 40_000, 2)]);
    damage(&mut files[0]);
    files
}

#[test]
fn a_repair_that_was_cut_off_can_be_run_again() {
    let (plain, lazy) = ("cluster_size=4k", "cluster_size=4k,lazy_refcounts=on");
    let command = |name, files, repair| Command {
        damaged: true,
        ..Command::new(name, files, self::repair(repair))
    };
    let commands = [
        command("leaks", files(plain, leak), Repair::Leaks),
        command("leaks and all", files(plain, leak), Repair::All),
        command(
            "clusters with a refcount of 0",
            files(plain, |file| lose_refcounts(file)),
            Repair::All,
        ),
        command(
            "an image that was not closed",
            files(lazy, |file| make_dirty(file)),
            Repair::All,
        ),
    ];
    let least = Least {
        crashes: 100,
        faults: 400,
    };
    try_all("check", &commands.map(Command::guest_data_unchanged), &least);
}
