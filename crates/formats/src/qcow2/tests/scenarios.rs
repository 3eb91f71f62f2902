//! The scenarios of the crash and fault tests.

use diskimage_core::{Preallocation as P, ZeroMode};

use super::scenario::Step::{
    Amend, Apply, Backing, Compressed, Discard, Drop, Empty, Flush, Resize, Take, Write, Zero,
};
use super::scenario::{Scenario, Step};

const KIB: u64 = 1024;
const KEEP: ZeroMode = ZeroMode::KeepAllocated;
const UNMAP: ZeroMode = ZeroMode::Unmap;

/// Writes, overwrites, zeroes and discards all over a disk of 256 KiB whose first half holds data.
fn everything() -> Vec<Step> {
    vec![
        Write(0, 5000, 2),
        Write(140_000, 9000, 3),
        Flush,
        Write(139_000, 2000, 4),
        Zero(8192, 16384, UNMAP),
        Zero(32768, 8192, KEEP),
        Flush,
        Write(9000, 10, 5),
        Write(33_000, 4096, 5),
        Write(200_000, 4096, 5),
        Flush,
        Discard(40_960, 32_768),
        Write(49_152, 4096, 6),
        Write(250_000, 3000, 6),
        Flush,
        // Freed clusters are allocated again.
        Write(150_000, 40_000, 7),
        Write(0, 4096, 7),
        Flush,
    ]
}

fn scenario(name: &'static str, options: &'static str, steps: Vec<Step>) -> Scenario {
    Scenario {
        name,
        options,
        size: 256 * KIB,
        setup: vec![Write(0, 128 * KIB, 1)],
        snapshot: false,
        bitmap: false,
        steps,
    }
}

pub(super) fn all() -> Vec<Scenario> {
    let mut all = vec![
        scenario("clusters of 4 KiB", "cluster_size=4096", everything()),
        scenario("clusters of 512 bytes", "cluster_size=512", everything()),
        scenario("version 2", "cluster_size=512,compat=0.10", everything()),
        scenario(
            "one-bit refcounts",
            "cluster_size=4096,refcount_bits=1",
            everything(),
        ),
        scenario("subclusters", "cluster_size=16384,extended_l2=on", everything()),
        scenario(
            "lazy refcounts",
            "cluster_size=4096,lazy_refcounts=on",
            everything(),
        ),
        scenario("a data file", "cluster_size=4096,data_file=data", everything()),
        scenario(
            "a raw data file",
            "cluster_size=4096,data_file=data,data_file_raw=on",
            everything(),
        ),
        Scenario {
            snapshot: true,
            ..scenario(
                "clusters that a snapshot shares",
                "cluster_size=4096",
                everything(),
            )
        },
        Scenario {
            bitmap: true,
            ..scenario("a bitmap", "cluster_size=4096", everything())
        },
        Scenario {
            bitmap: true,
            ..scenario("a bitmap and writes in place", "cluster_size=4096", in_place())
        },
        Scenario {
            bitmap: true,
            ..scenario("a bitmap in small clusters", "cluster_size=512", in_place())
        },
    ];
    all.extend([
        compressed(),
        shrinking(),
        shrinking_small(),
        below_snapshot(),
        table_growth(),
    ]);
    all.extend(growing());
    all.extend(snapshots());
    all.extend(amends());
    all.extend(emptying());
    all.extend(set_backing());
    all
}

/// Writes to allocated clusters, each after a flush, with resizes between them.
fn in_place() -> Vec<Step> {
    vec![
        Write(0, 5000, 2),
        Flush,
        Write(100_000, 4096, 3),
        Flush,
        Write(60_000, 100, 4),
        Flush,
        Resize(300 * KIB, P::Off),
        Write(80_000, 5000, 5),
        Flush,
        Write(290 * KIB, 4096, 6),
        Flush,
        Write(30_000, 5000, 7),
        Resize(200 * KIB, P::Off),
        Write(115_000, 5000, 7),
        Flush,
    ]
}

fn compressed() -> Scenario {
    let steps = vec![
        Compressed(0, 2),
        Compressed(4096, 3),
        Compressed(128 * KIB, 4),
        Flush,
        Compressed(0, 5),
        Write(4096, 100, 6),
        Compressed(8192, 2),
        Flush,
        Discard(0, 4096),
        Compressed(12_288, 3),
        Zero(8192, 4096, UNMAP),
        Flush,
        Compressed(16_384, 4),
        Write(132 * KIB, 4096, 5),
        Write(128 * KIB, 4096, 7),
        Flush,
    ];
    scenario("compressed clusters", "cluster_size=4096", steps)
}

fn shrinking() -> Scenario {
    let steps = vec![
        Write(180_000, 20_000, 2),
        Resize(190_464, P::Off),
        Write(0, 5000, 3),
        Resize(100 * KIB, P::Off),
        Flush,
        Resize(256 * KIB, P::Off),
        Write(110 * KIB, 9000, 4),
        Flush,
    ];
    scenario("shrinking", "cluster_size=4096", steps)
}

fn shrinking_small() -> Scenario {
    let steps = vec![
        Resize(60_928, P::Off),
        Write(20_000, 10_000, 3),
        Flush,
        Resize(512, P::Off),
        Write(0, 512, 4),
        Flush,
        Resize(64 * KIB, P::Off),
        Write(40_000, 10_000, 5),
        Flush,
    ];
    scenario("shrinking with small clusters", "cluster_size=512", steps)
}

fn below_snapshot() -> Scenario {
    let steps = vec![
        Resize(150_016, P::Off),
        Write(60_000, 512, 2),
        Resize(40 * KIB, P::Off),
        Flush,
        Resize(400 * KIB, P::Metadata),
        Write(0, 10_000, 3),
        Flush,
    ];
    Scenario {
        snapshot: true,
        ..scenario("a new size above a snapshot", "cluster_size=4096", steps)
    }
}

/// A full refcount table that must grow while L2 tables are allocated.
fn table_growth() -> Scenario {
    let steps = vec![
        Write(1900 * KIB, 60 * KIB, 2),
        Flush,
        Write(1960 * KIB, 100 * KIB, 3),
        Write(0, 4096, 4),
        Flush,
        Write(2500 * KIB, 10 * KIB, 5),
        Discard(64 * KIB, 64 * KIB),
        Flush,
        Write(2600 * KIB, 20 * KIB, 6),
        Flush,
    ];
    Scenario {
        size: 3 << 20,
        setup: vec![Write(0, 1890 * KIB, 1)],
        ..scenario(
            "a larger refcount table",
            "cluster_size=512,refcount_bits=64",
            steps,
        )
    }
}

fn growing() -> impl Iterator<Item = Scenario> {
    let modes = [
        ("growing", P::Off),
        ("growing with tables", P::Metadata),
        ("growing with storage", P::Falloc),
        ("growing with zeroes", P::Full),
    ];
    modes.into_iter().map(|(name, mode)| {
        let steps = vec![
            Write(130 * KIB, 1000, 2),
            Resize(300_032, mode),
            Write(260 * KIB, 4096, 3),
            Resize(400 * KIB, mode),
            Write(0, 3000, 4),
            Flush,
            Write(390 * KIB, 3000, 5),
            Discard(0, 16_384),
            Flush,
            Resize(450 * KIB, mode),
            Write(440 * KIB, 3000, 6),
            Flush,
        ];
        scenario(name, "cluster_size=512", steps)
    })
}

/// Snapshots are created, applied and deleted, with writes in between.
pub(super) fn snapshots() -> Vec<Scenario> {
    let steps = || {
        vec![
            Write(5000, 20_000, 2),
            Take("t"),
            Write(0, 8192, 3),
            Write(200_000, 5000, 3),
            Flush,
            Apply("t"),
            Write(4096, 4096, 4),
            Flush,
            Drop("t"),
            Write(16_384, 30_000, 5),
            Take("u"),
            Drop("u"),
            Write(0, 4096, 6),
            Flush,
        ]
    };
    let back = vec![
        Write(0, 60_000, 2),
        Flush,
        Take("t"),
        Write(30_000, 60_000, 3),
        Apply("s"),
        Write(20_000, 4096, 4),
        Apply("t"),
        Drop("t"),
        Write(100_000, 4096, 5),
        Flush,
    ];
    let sizes = vec![
        Take("t"),
        Resize(400 * KIB, P::Off),
        Write(300 * KIB, 8192, 2),
        Apply("t"),
        Write(10_000, 4096, 3),
        Flush,
        Drop("t"),
    ];
    vec![
        scenario("snapshots", "cluster_size=4096", steps()),
        scenario("snapshots in small clusters", "cluster_size=512", steps()),
        scenario("snapshots of version 2", "cluster_size=4096,compat=0.10", steps()),
        scenario(
            "snapshots of subclusters",
            "cluster_size=16384,extended_l2=on",
            steps(),
        ),
        scenario(
            "snapshots and narrow counts",
            "cluster_size=4096,refcount_bits=4",
            steps(),
        ),
        Scenario {
            snapshot: true,
            ..scenario("snapshots below and above", "cluster_size=4096", back)
        },
        scenario("snapshots and sizes", "cluster_size=4096", sizes),
    ]
}

/// Snapshots on a full disk, without guest writes between them.
pub(super) fn snapshots_on_full_disk() -> Vec<Scenario> {
    let forms = [
        ("snapshots without room", "cluster_size=4096"),
        ("snapshots in small clusters without room", "cluster_size=512"),
        (
            "snapshots of version 2 without room",
            "cluster_size=4096,compat=0.10",
        ),
        (
            "snapshots of subclusters without room",
            "cluster_size=16384,extended_l2=on",
        ),
    ];
    let one = |(name, options)| Scenario {
        setup: vec![
            Write(0, 128 * KIB, 1),
            Take("t"),
            Write(30_000, 60_000, 2),
            Take("u"),
            Write(0, 20_000, 3),
            Take("v"),
            Write(10_000, 60_000, 4),
        ],
        ..scenario(
            name,
            options,
            vec![Apply("u"), Drop("u"), Apply("t"), Drop("t"), Drop("v")],
        )
    };
    forms.map(one).into()
}

/// Images with data, zero clusters and, in some, a snapshot are amended.
fn amends() -> Vec<Scenario> {
    let one = |name, options, amend| Scenario {
        setup: vec![
            Write(0, 128 * KIB, 1),
            Zero(8192, 16_384, UNMAP),
            Zero(49_152, 16_384, KEEP),
            Zero(200 * KIB, 16_384, UNMAP),
        ],
        ..scenario(name, options, vec![Amend(amend)])
    };
    let old = |name, options, amend| Scenario {
        setup: vec![Write(0, 128 * KIB, 1)],
        ..one(name, options, amend)
    };
    vec![
        one("a lower version", "cluster_size=4096", "compat=0.10"),
        one(
            "a lower version in small clusters",
            "cluster_size=512",
            "compat=0.10",
        ),
        Scenario {
            snapshot: true,
            ..one(
                "a lower version with a snapshot",
                "cluster_size=4096",
                "compat=0.10",
            )
        },
        old(
            "a higher version",
            "cluster_size=4096,compat=0.10",
            "compat=1.1,lazy_refcounts=on",
        ),
        old(
            "a higher version with names",
            "cluster_size=16384,compat=0.10",
            "compat=1.1",
        ),
        one("wider refcounts", "cluster_size=4096", "refcount_bits=64"),
        one(
            "wider refcounts in small clusters",
            "cluster_size=512",
            "refcount_bits=64",
        ),
        one("narrower refcounts", "cluster_size=512", "refcount_bits=1"),
        Scenario {
            snapshot: true,
            ..one(
                "narrower refcounts with a snapshot",
                "cluster_size=4096",
                "refcount_bits=2,lazy_refcounts=on",
            )
        },
        one(
            "everything",
            "cluster_size=4096,refcount_bits=8",
            "compat=0.10,refcount_bits=16",
        ),
        one(
            "the name of the data file",
            "cluster_size=4096,data_file=data",
            "data_file=moved",
        ),
    ]
}

fn emptying() -> impl Iterator<Item = Scenario> {
    let forms = [
        ("emptying", "cluster_size=4096", false),
        ("emptying small clusters", "cluster_size=512", false),
        ("emptying version 2", "cluster_size=4096,compat=0.10", false),
        ("emptying above a snapshot", "cluster_size=4096", true),
    ];
    forms.into_iter().map(|(name, options, snapshot)| {
        let steps = vec![
            Write(0, 5000, 2),
            Compressed(128 * KIB, 4),
            Flush,
            Empty,
            Write(100_000, 9000, 3),
            Flush,
            Empty,
        ];
        let steps = if options.contains("=4096") {
            steps
        } else {
            steps
                .into_iter()
                .filter(|step| !matches!(step, Compressed(..)))
                .collect()
        };
        Scenario {
            snapshot,
            ..scenario(name, options, steps)
        }
    })
}

/// Backing file names and formats that become longer, shorter, or are removed.
fn set_backing() -> impl Iterator<Item = Scenario> {
    let forms = [
        ("another image below", "cluster_size=4096"),
        ("another image below a small cluster", "cluster_size=512"),
        ("another image below one of 1 KiB", "cluster_size=1024"),
        ("another image below large clusters", "cluster_size=65536"),
        ("another image below version 2", "cluster_size=4096,compat=0.10"),
        (
            "another image below one with a data file",
            "cluster_size=65536,data_file=data",
        ),
    ];
    forms.into_iter().map(|(name, options)| {
        let steps = vec![
            Write(0, 5000, 2),
            Backing("base", "raw"),
            Write(8000, 500, 3),
            Backing("another/base.qcow2", "qcow2"),
            Backing("x", "raw"),
            Backing("", ""),
            Backing("a-name-that-is-a-little-longer-than-the-others", "raw"),
            Backing("b", ""),
            Flush,
        ];
        scenario(name, options, steps)
    })
}
