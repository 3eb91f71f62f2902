//! The limits of this machine, to compare the figures with.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use zlib_rs::{Deflate, DeflateFlush, Inflate, InflateFlush};

use crate::error::{Context, Result};
use crate::machine::cores;
use crate::measure::remove;
use crate::units::KIB;

/// The rate of one kind of work in bytes per second, on one core and on all.
#[derive(Debug)]
pub(crate) struct Limit {
    pub(crate) name: &'static str,
    pub(crate) one: f64,
    pub(crate) all: f64,
    pub(crate) cores: usize,
}

/// The default cluster size of qcow2, which is the unit of compression.
const CLUSTER: usize = 64 * 1024;
/// The number of bytes of each measurement.
const SAMPLE: u64 = 64 * KIB * KIB;
/// The number of measurements of one rate; the best one is reported.
const TRIES: u32 = 3;

/// Measures with data taken from `input`; a file to write goes to `scratch`.
pub(crate) fn measure(input: &Path, scratch: &Path) -> Result<Vec<Limit>> {
    let clusters = sample(input).with_context(|| input.display().to_string())?;
    let zlib: Vec<_> = clusters.iter().map(|cluster| deflate(cluster)).collect();
    let zstd: Vec<_> = clusters
        .iter()
        .map(|cluster| zstd_compress(cluster))
        .collect::<io::Result<_>>()
        .context("zstd")?;

    // A buffer for each cluster, so that the copies leave the processor's caches as those of a conversion do.
    let copies: Vec<_> = clusters
        .iter()
        .map(|cluster| Mutex::new(cluster.clone()))
        .collect();

    let mut limits = vec![
        limit("copy in memory", &clusters, |index, cluster| {
            if let Ok(mut copy) = copies[index].lock() {
                copy.copy_from_slice(black_box(cluster));
            }
        }),
        limit("zlib-rs level 6, 64 KiB", &clusters, |_, cluster| {
            black_box(deflate(cluster));
        }),
        limit("zlib-rs inflate", &zlib, |_, packed| {
            let mut out = [0; CLUSTER];
            // Compressed above, so it is valid; only the time matters.
            let _ = Inflate::new(false, 15).decompress(packed, &mut out, InflateFlush::Finish);
            black_box(out);
        }),
        limit("zstd level 3, 64 KiB", &clusters, |_, cluster| {
            let _ = black_box(zstd_compress(cluster));
        }),
        limit("zstd decompress", &zstd, |_, packed| {
            let _ = black_box(zstd::bulk::decompress(packed, CLUSTER));
        }),
    ];
    limits.insert(1, page_cache(&clusters, &scratch.join("written.bin"))?);
    Ok(limits)
}

/// Clusters with data, taken evenly from the whole file.
fn sample(input: &Path) -> io::Result<Vec<Vec<u8>>> {
    let file = File::open(input)?;
    let clusters = file.metadata()?.len() / CLUSTER as u64;
    let wanted = SAMPLE / CLUSTER as u64;
    let step = (clusters / wanted).max(1);
    let mut sample = Vec::new();
    for index in (0..clusters).step_by(usize::try_from(step).unwrap_or(1)) {
        let mut cluster = vec![0; CLUSTER];
        file.read_exact_at(&mut cluster, index * CLUSTER as u64)?;
        if cluster.iter().any(|&byte| byte != 0) {
            sample.push(cluster);
        }
    }
    Ok(sample)
}

/// The rate of writes to a new file, which is the limit of a conversion to an uncompressed image.
fn page_cache(clusters: &[Vec<u8>], path: &Path) -> Result<Limit> {
    let rate = |threads: usize| -> Result<f64> {
        let mut best = Duration::MAX;
        for _ in 0..TRIES {
            // A new file each time: overwriting pages in the page cache is faster than allocating them.
            remove(path)?;
            let file = File::create(path).with_context(|| path.display().to_string())?;
            best = best.min(timed(threads, clusters, &|index, cluster: &Vec<u8>| {
                // Errors are ignored: the comparisons before have written much more to the same directory.
                let _ = file.write_all_at(cluster, (index * CLUSTER) as u64);
            }));
        }
        Ok((clusters.len() * CLUSTER) as f64 / best.as_secs_f64())
    };
    let limit = Limit {
        name: "write to page cache",
        one: rate(1)?,
        all: rate(cores())?,
        cores: cores(),
    };
    remove(path)?;
    Ok(limit)
}

/// Does `work` on every item, once on one thread and once on as many as there are cores; rates count clusters of
/// guest data, compressed or not.
fn limit(name: &'static str, items: &[Vec<u8>], work: impl Fn(usize, &Vec<u8>) + Sync) -> Limit {
    let rate = |threads: usize| {
        let best = (0..TRIES)
            .map(|_| timed(threads, items, &work))
            .min()
            .unwrap_or(Duration::MAX);
        (items.len() * CLUSTER) as f64 / best.as_secs_f64()
    };
    Limit {
        name,
        one: rate(1),
        all: rate(cores()),
        cores: cores(),
    }
}

fn timed(threads: usize, items: &[Vec<u8>], work: &(impl Fn(usize, &Vec<u8>) + Sync)) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for (index, item) in items.iter().enumerate().skip(thread).step_by(threads) {
                    work(index, item);
                }
            });
        }
    });
    start.elapsed()
}

/// A raw deflate stream with the 4 KiB window that qcow2 prescribes for writers.
fn deflate(cluster: &[u8]) -> Vec<u8> {
    let mut out = vec![0; cluster.len() + cluster.len() / 8 + 64];
    let mut stream = Deflate::new(6, false, 12);
    // The output has room for data that does not compress, so one call finishes the stream.
    let _ = stream.compress(cluster, &mut out, DeflateFlush::Finish);
    out.truncate(usize::try_from(stream.total_out()).unwrap_or(usize::MAX));
    out
}

fn zstd_compress(cluster: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(cluster, 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_deflate_packs_inflate_unpacks() {
        let cluster: Vec<u8> = (0..CLUSTER).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let packed = deflate(&cluster);
        let mut out = vec![0; CLUSTER];
        Inflate::new(false, 15)
            .decompress(&packed, &mut out, InflateFlush::Finish)
            .unwrap();
        assert_eq!(out, cluster);
    }

    #[test]
    fn empty_clusters_are_not_sampled() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 * CLUSTER as u64).unwrap();
        file.as_file().write_all_at(b"x", 2 * CLUSTER as u64).unwrap();
        assert_eq!(sample(file.path()).unwrap().len(), 1);
    }
}
