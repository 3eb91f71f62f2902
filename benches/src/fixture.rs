//! The input files, created once by the stock program and kept in the work directory.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::filesystem_image;
use crate::measure::Tool;
use crate::units::KIB;
use crate::workload::{Token, fixtures_of, tokens};

/// One input file and its recipe.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) name: &'static str,
    recipe: Recipe,
}

#[derive(Debug)]
enum Recipe {
    /// A file system with files of this machine, which has real data and real holes.
    FilesystemImage,
    /// A sparse file with a small run of data in every 64 KiB, four times as long as the other inputs.
    Fragments,
    /// A sixteenth of the file system image, from its middle: for commands that are slow even with little data.
    Part,
    /// A passphrase.
    Passphrase,
    /// Commands of the stock program; `{this}` is the file that they create.
    Stock(&'static [&'static str]),
}

pub(crate) const FIXTURES: &[Fixture] = &[
    Fixture {
        name: "raw",
        recipe: Recipe::FilesystemImage,
    },
    Fixture {
        name: "qcow2",
        recipe: Recipe::Stock(&["convert -f raw -O qcow2 {raw} {this}"]),
    },
    Fixture {
        name: "second",
        recipe: Recipe::Stock(&["convert -f qcow2 -O qcow2 {qcow2} {this}"]),
    },
    Fixture {
        name: "zlib",
        recipe: Recipe::Stock(&["convert -f raw -O qcow2 -c {raw} {this}"]),
    },
    Fixture {
        name: "zstd",
        recipe: Recipe::Stock(&["convert -f raw -O qcow2 -c -o compression_type=zstd {raw} {this}"]),
    },
    Fixture {
        name: "vmdk",
        recipe: Recipe::Stock(&["convert -f raw -O vmdk {raw} {this}"]),
    },
    Fixture {
        name: "stream",
        recipe: Recipe::Stock(&["convert -f raw -O vmdk -o subformat=streamOptimized {raw} {this}"]),
    },
    Fixture {
        name: "vdi",
        recipe: Recipe::Stock(&["convert -f raw -O vdi {raw} {this}"]),
    },
    Fixture {
        name: "vpc",
        recipe: Recipe::Stock(&["convert -f raw -O vpc -o force_size=on {raw} {this}"]),
    },
    Fixture {
        name: "vhdx",
        recipe: Recipe::Stock(&["convert -f raw -O vhdx {raw} {this}"]),
    },
    Fixture {
        name: "qed",
        recipe: Recipe::Stock(&["convert -f raw -O qed {raw} {this}"]),
    },
    Fixture {
        name: "qcow",
        recipe: Recipe::Stock(&["convert -f raw -O qcow {raw} {this}"]),
    },
    Fixture {
        name: "qcow-zlib",
        recipe: Recipe::Stock(&["convert -f raw -O qcow -c {raw} {this}"]),
    },
    Fixture {
        name: "parallels",
        recipe: Recipe::Stock(&["convert -f raw -O parallels {raw} {this}"]),
    },
    // All clusters allocated, none written: 32 MiB of L2 tables and 8 MiB of refcounts to walk in a sparse file.
    Fixture {
        name: "large",
        recipe: Recipe::Stock(&["create -q -f qcow2 -o preallocation=metadata {this} 256G"]),
    },
    Fixture {
        name: "fragments",
        recipe: Recipe::Fragments,
    },
    Fixture {
        name: "fragmented",
        recipe: Recipe::Stock(&["convert -f raw -O qcow2 -o cluster_size=4k -S 4k {fragments} {this}"]),
    },
    // 128 MiB of L2 tables and 32 MiB of refcounts if the input is 1 GiB.
    Fixture {
        name: "metadata",
        recipe: Recipe::Stock(&["create -q -f qcow2 -o preallocation=metadata {this} {x1024}"]),
    },
    // Has a cluster of data or zeroes for each allocated cluster of its base.
    Fixture {
        name: "overlay",
        recipe: Recipe::Stock(&["convert -f raw -O qcow2 -B {qcow2} -F qcow2 {raw} {this}"]),
    },
    Fixture {
        name: "empty-overlay",
        recipe: Recipe::Stock(&["create -q -f qcow2 -b {qcow2} -F qcow2 {this}"]),
    },
    Fixture {
        name: "blank",
        recipe: Recipe::Stock(&["create -q -f qcow2 {this} {x1024}"]),
    },
    Fixture {
        name: "part",
        recipe: Recipe::Part,
    },
    // Two bitmaps of 4 MiB with bits set all over their first quarter if the input is 1 GiB.
    Fixture {
        name: "bitmaps",
        recipe: Recipe::Stock(&[
            "create -q -f qcow2 {this} {x16}",
            "bitmap --add -g 512 -f qcow2 {this} first",
            "bitmap --add -g 512 -f qcow2 {this} second",
            "convert -n -f raw -O qcow2 {fragments} {this}",
        ]),
    },
    Fixture {
        name: "key",
        recipe: Recipe::Passphrase,
    },
    // A short key derivation: the conversion of data is measured.
    Fixture {
        name: "luks",
        recipe: Recipe::Stock(&[
            "convert -f raw -O luks --object secret,id=key,file={key} -o key-secret=key,iter-time=10 {raw} {this}",
        ]),
    },
    Fixture {
        name: "qcow2-luks",
        recipe: Recipe::Stock(&["convert -f raw -O qcow2 --object secret,id=key,file={key} \
             -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 {raw} {this}"]),
    },
];

/// Finds fixtures by name, and creates missing ones.
#[derive(Debug)]
pub(crate) struct Fixtures<'a> {
    directory: PathBuf,
    size: u64,
    stock: &'a Tool,
}

impl<'a> Fixtures<'a> {
    /// The fixtures for inputs of `size` bytes, kept in `work`.
    pub(crate) fn new(work: &Path, size: u64, stock: &'a Tool) -> Result<Self> {
        let directory = work.join(format!("inputs-{}M", size / KIB / KIB));
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        // Absolute names do not depend on the current directory of the programs.
        let directory = fs::canonicalize(&directory).with_context(|| directory.display().to_string())?;
        Ok(Self {
            directory,
            size,
            stock,
        })
    }

    /// The file of this name, which must be one of [`FIXTURES`].
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(format!("{name}.img"));
        if path.exists() {
            return Ok(path);
        }
        let fixture = FIXTURES
            .iter()
            .find(|fixture| fixture.name == name)
            .ok_or_else(|| Error::new(format!("no input file is called '{name}'")))?;
        // Under another name until it is complete: an interrupted run must not leave an incomplete fixture.
        let partial = self.directory.join(format!("{name}.partial"));
        self.make(fixture, &partial)?;
        fs::rename(&partial, &path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// The words of a command, with the names in braces replaced; `files` are those that are not fixtures.
    pub(crate) fn arguments(&self, command: &str, files: &[(&str, &Path)]) -> Result<Vec<OsString>> {
        command
            .split(' ')
            .map(|word| {
                // An empty word is written as ''.
                if word == "''" {
                    return Ok(OsString::new());
                }
                let mut argument = OsString::new();
                for token in tokens(word) {
                    match token {
                        Token::Text(text) => argument.push(text),
                        Token::Name(name) => argument.push(self.named(name, files)?),
                    }
                }
                Ok(argument)
            })
            .collect()
    }

    fn named(&self, name: &str, files: &[(&str, &Path)]) -> Result<OsString> {
        if let Some((_, path)) = files.iter().find(|(file, _)| *file == name) {
            return Ok(path.into());
        }
        match name
            .strip_prefix('x')
            .and_then(|factor| factor.parse::<u64>().ok())
        {
            Some(factor) => Ok((self.size * factor).to_string().into()),
            None => Ok(self.path(name)?.into()),
        }
    }

    fn make(&self, fixture: &Fixture, path: &Path) -> Result<()> {
        match fixture.recipe {
            Recipe::FilesystemImage => filesystem_image::make(path, self.size),
            Recipe::Fragments => {
                make_fragments(path, self.size * 4).with_context(|| path.display().to_string())
            }
            Recipe::Part => {
                make_part(&self.path("raw")?, path, self.size).with_context(|| path.display().to_string())
            }
            Recipe::Passphrase => {
                fs::write(path, "correct horse").with_context(|| path.display().to_string())
            }
            Recipe::Stock(commands) => commands.iter().try_for_each(|command| {
                for name in fixtures_of(command) {
                    self.path(name)?;
                }
                self.stock
                    .run_untimed(&self.arguments(command, &[("this", path)])?)
            }),
        }
    }
}

fn make_part(raw: &Path, path: &Path, size: u64) -> std::io::Result<()> {
    let mut source = File::open(raw)?;
    source.seek(SeekFrom::Start(size / 2))?;
    std::io::copy(&mut source.take(size / 16), &mut File::create(path)?)?;
    Ok(())
}

fn make_fragments(path: &Path, len: u64) -> std::io::Result<()> {
    let file = File::create(path)?;
    file.set_len(len)?;
    let mut block = [0x5a; 4096];
    for offset in (0..len).step_by(65536) {
        block[..8].copy_from_slice(&offset.to_le_bytes());
        file.write_all_at(&block, offset)?;
    }
    Ok(())
}
