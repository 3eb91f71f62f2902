//! `bitmap`: a bitmap changes atomically.

use diskimage_core::{Bitmaps, ByteRange, Device, Error, NewBitmap, Result};

use super::disks::{Disks, Files, ImagePlan, make};
use super::{Command, Least, try_all};
use crate::{OpenOptions, merge_bitmap};

const KIB: u64 = 1024;

/// The command that does `act` to the image's bitmaps.
pub(super) fn bitmap(
    act: impl Fn(&dyn Bitmaps) -> Result<()> + Send + Sync,
) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let image = disks.open("top", OpenOptions::new().no_backing(true).write(true))?;
        let bitmaps = image.layer().bitmaps();
        act(bitmaps.ok_or_else(|| Error::unsupported("no bitmaps"))?)?;
        image.flush()
    }
}

/// Merges the bitmap "a" of the image `from` into "b".
fn merge(from: &'static str) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let image = disks.open("top", OpenOptions::new().no_backing(true).write(true))?;
        let options = OpenOptions::new().no_backing(true);
        let source = if from == "top" {
            image.clone()
        } else {
            disks.open(from, options)?
        };
        merge_bitmap(&**source.layer(), "a", &**image.layer(), "b")?;
        image.flush()
    }
}

/// Two images with dirty ranges in the bitmaps "a" and "b".
fn files(options: &'static str) -> Files {
    let plan = ImagePlan::qcow2(options, 96 * KIB).data(0, 40_000, 1);
    let mut files = make(&[plan.clone(), plan]);
    let marks = [("top", "a", 0), ("top", "b", 30_000), ("base", "a", 60_000)];
    let disks = Disks::holding(&files);
    for (file, name, at) in marks {
        let image = disks.open(file, OpenOptions::new().write(true)).expect("opens");
        let bitmaps = image.layer().bitmaps().expect("has bitmaps");
        add(bitmaps, name).expect("memory");
        bitmaps.mark(name, &[ByteRange::at(at, 5000)]).expect("memory");
        image.flush().expect("memory");
    }
    files = disks.contents();
    files
}

pub(super) fn add(bitmaps: &dyn Bitmaps, name: &str) -> Result<()> {
    bitmaps.add(&NewBitmap {
        name,
        granularity: Some(512),
        enabled: true,
    })
}

#[test]
fn bitmaps_change_atomically() {
    let (plain, small) = ("cluster_size=4k", "cluster_size=512");
    let commands = [
        Command::new("add", files(plain), bitmap(|bitmaps| add(bitmaps, "c"))),
        Command::new(
            "add in small clusters",
            files(small),
            bitmap(|bitmaps| add(bitmaps, "c")),
        ),
        Command::new("remove", files(plain), bitmap(|bitmaps| bitmaps.remove("a"))),
        Command::new("clear", files(plain), bitmap(|bitmaps| bitmaps.clear("a"))),
        Command::new(
            "clear in small clusters",
            files(small),
            bitmap(|bitmaps| bitmaps.clear("a")),
        ),
        Command::new(
            "disable",
            files(plain),
            bitmap(|bitmaps| bitmaps.set_enabled("a", false)),
        ),
        Command::new("merge", files(plain), merge("top")),
        Command::new("merge in small clusters", files(small), merge("top")),
        Command::new("merge from another image", files(plain), merge("base")),
    ];
    let least = Least {
        crashes: 300,
        faults: 500,
    };
    try_all("bitmap", &commands.map(Command::guest_data_unchanged), &least);
}
