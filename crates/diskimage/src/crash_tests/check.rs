//! `check -r`: the disk reads as before, and the next repair finishes the work.

use diskimage_core::{Error, Progress, Repair, Result};

use super::disks::{Disks, Files, Plan, make};
use super::{Command, try_all};
use crate::OpenOptions;

const KIB: u64 = 1024;
const CLUSTER: usize = 4096;

/// The whole command: a repair, and a look at what is left.
fn mend(repair: Repair) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let image = disks.open("top", OpenOptions::new().for_check(true).write(true))?;
        let check = |repair| image.layer().check(repair, &Progress::none());
        check(repair)?;
        let left = check(Repair::No)?;
        match (left.corruptions, left.check_errors, left.leaks) {
            (0, 0, 0) => Ok(()),
            _ => Err(Error::invalid(format!("not mended: {left:?}"))),
        }
    }
}

fn number(file: &[u8], at: usize) -> usize {
    let bytes = file[at..at + 8].try_into().expect("eight");
    usize::try_from(u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00).expect("small")
}

/// Where the guest's cluster is.
fn data(file: &[u8], cluster: usize) -> usize {
    let l2 = number(file, number(file, 40));
    number(file, l2 + cluster * 8)
}

fn set_count(file: &mut [u8], offset: usize, count: u8) {
    let block = number(file, number(file, 48));
    let at = block + offset / CLUSTER * 2;
    file[at..at + 2].copy_from_slice(&[0, count]);
}

fn leak(file: &mut Vec<u8>) {
    let end = file.len().next_multiple_of(CLUSTER);
    file.resize(end + 3 * CLUSTER, 0x55);
    for cluster in 0..3 {
        set_count(file, end + cluster * CLUSTER, 1);
    }
    let shared = data(file, 2);
    set_count(file, shared, 2);
}

fn uncount(file: &mut [u8]) {
    for cluster in [0, 3, 5] {
        let offset = data(file, cluster);
        set_count(file, offset, 0);
    }
}

fn dirty(file: &mut [u8]) {
    file[79] |= 1;
    uncount(file);
}

fn files(options: &'static str, harm: fn(&mut Vec<u8>)) -> Files {
    let mut files = make(&[Plan::qcow2(options, 96 * KIB)
        .data(0, 40_000, 1)
        .snapshot("old")
        .data(20_000, 40_000, 2)]);
    harm(&mut files[0]);
    files
}

#[test]
fn a_repair_can_be_done_again() {
    let (plain, lazy) = ("cluster_size=4k", "cluster_size=4k,lazy_refcounts=on");
    let command = |name, files, repair| Command {
        damaged: true,
        ..Command::new(name, files, mend(repair))
    };
    let commands = [
        command("leaks", files(plain, leak), Repair::Leaks),
        command("leaks and all", files(plain, leak), Repair::All),
        command(
            "clusters that count as free",
            files(plain, |file| uncount(file)),
            Repair::All,
        ),
        command(
            "an image that was not closed",
            files(lazy, |file| dirty(file)),
            Repair::All,
        ),
    ];
    try_all("check", &commands.map(Command::guest_data_unchanged), (100, 400));
}
