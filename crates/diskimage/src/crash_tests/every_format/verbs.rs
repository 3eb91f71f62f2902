//! The commands that write.

use std::num::NonZeroU32;
use std::sync::Arc;

use diskimage_core::errno;
use diskimage_core::{
    ByteRange, Device, ErrorKind, Image, Preallocation, Progress, Repair, Result, ZeroMode,
};
use diskimage_testing::{Journal, RecordingDevice};

use super::forms::{FORMS, Form, cast};
use crate::crash_tests::Command;
use crate::crash_tests::amend::amend;
use crate::crash_tests::bitmap::{add, bitmap};
use crate::crash_tests::commit::commit;
use crate::crash_tests::disks::{Cast, Disks, Files, ImagePlan, make_cast};
use crate::crash_tests::judge::check;
use crate::crash_tests::rebase::{rebase, rename};
use crate::crash_tests::resize::resize;
use crate::crash_tests::snapshot;
use crate::{Bench, Conversion, OpenOptions, Requests, dd, flush};

/// A command that writes.
pub(super) struct Verb {
    pub(super) name: &'static str,
    /// The command on images of a form; `None` if that form cannot do it.
    pub(super) on: fn(&'static Form) -> Option<Command>,
}

/// All of them.
pub(super) static VERBS: [Verb; 25] = [
    verb("create", |form| {
        let mut command = new(form, &[], move |disks| create(disks, form))?;
        Arc::make_mut(&mut command.cast).roles[0].is_blank = true;
        Some(command)
    }),
    verb("create -b", |form| {
        form.can_be_overlay().then_some(())?;
        let below = base_of(form);
        let plan = form.overlay(below.format);
        let command = new(form, &[("base", below)], move |disks| {
            plan.create(disks, "top")?;
            complete(disks)
        })?;
        Some(command)
    }),
    verb("convert", |form| {
        new(form, &[("source", raw())], move |disks| {
            convert(disks, form, false)
        })
    }),
    verb("convert -c", |form| {
        // A stream is always compressed, and other images of its format never.
        (form.format != "vmdk").then_some(())?;
        new(form, &[("source", raw())], move |disks| {
            convert(disks, form, true)
        })
    }),
    verb("convert -n", |form| {
        in_place(form, &[("source", raw())], move |disks| {
            copy_to(disks, Order::Same, false)
        })
        .map(Command::marked)
    }),
    verb("convert -n -W", |form| {
        in_place(form, &[("source", raw())], move |disks| {
            copy_to(disks, Order::Any, false)
        })
        .map(Command::marked)
    }),
    verb("dd", |form| {
        new(form, &[("source", raw())], move |disks| {
            create(disks, form)?;
            let source = disks.open("source", OpenOptions::new())?;
            let target = disks.open("top", OpenOptions::new().write(true).resize(true))?;
            dd(&source, (0, source.len()), 512, &target)?;
            drop(target);
            complete(disks)
        })
    }),
    verb("write", |form| {
        in_place(form, &[], move |disks| write(disks, form)).map(Command::gradual)
    }),
    verb("write at random", |form| {
        in_place(form, &[], move |disks| write_at_random(disks, form)).map(Command::gradual)
    }),
    verb("bench -w", |form| {
        in_place(form, &[], move |disks| bench(disks, form)).map(Command::gradual)
    }),
    verb("commit to", |form| {
        form.can_change().then_some(())?;
        let images = [("top", qcow2()), ("base", form)];
        let plans = [
            (
                "top",
                changed(qcow2().overlay(form.format).of_len(form.size()), form),
            ),
            ("base", filled(form.plan(), form)),
        ];
        on_images(&images, &plans, commit(1, false)).map(Command::gradual)
    }),
    verb("commit from", |form| {
        let images = [("top", form), ("base", base_of(form))];
        let plans = overlaid(form)?;
        let emptying = on_images(&images, &plans, commit(1, false));
        let command = emptying
            .or_else(|| on_images(&images, &plans, commit(1, true)))?
            .gradual();
        if form.format == "vmdk" {
            // The first write changes the content ID of the base, as in qemu-img. From then on the overlay alone is not
            // readable, but the commit can be run again.
            return Some(looking_at(command, "base"));
        }
        Some(command.guest_data_unchanged())
    }),
    verb("rebase", |form| {
        let below = base_of(form);
        let images = [("top", form), ("base", below), ("new", below)];
        let [top, base] = overlaid(form)?;
        let new = below.plan().of_len(form.size()).data(0, form.size() / 2, 7);
        let plans = [top, base, ("new", new)];
        let command = on_images(&images, &plans, rebase(Some(("new", below.format)), false))?;
        Some(reading(command, &["base", "new"]).guest_data_unchanged())
    }),
    verb("rebase -u", |form| {
        let images = [("top", form), ("base", base_of(form)), ("new", base_of(form))];
        let [top, base] = overlaid(form)?;
        let plans = [top, base.clone(), ("new", base.1)];
        let command = on_images(&images, &plans, rename(Some(("new", base_of(form).format))))?;
        Some(reading(command, &["base", "new"]).guest_data_unchanged())
    }),
    verb("resize", |form| {
        let command = in_place(form, &[], resize(2 * form.size() / 512 * 512, Preallocation::Off))?;
        let end = usize::try_from(form.size()).expect("small");
        let footer = if form.name == "vpc, fixed" {
            end..end + 512
        } else {
            0..0
        };
        Some(Command {
            // The old footer is there until the new one is durable: a file without a footer is no image.
            repeatable: footer.is_empty(),
            arbitrary: footer,
            ..command
        })
    }),
    verb("resize --shrink", |form| {
        in_place(form, &[], resize(form.size() / 2 / 512 * 512, Preallocation::Off))
    }),
    verb("snapshot -c", |form| with_snapshot(form, snapshot::create)),
    verb("snapshot -a", |form| with_snapshot(form, snapshot::apply)),
    verb("snapshot -d", |form| with_snapshot(form, snapshot::delete)),
    verb("bitmap --add", |form| {
        with_bitmap(form, bitmap(|bitmaps| add(bitmaps, "c")))
    }),
    verb("bitmap --remove", |form| {
        with_bitmap(form, bitmap(|bitmaps| bitmaps.remove("a")))
    }),
    verb("bitmap --clear", |form| {
        with_bitmap(form, bitmap(|bitmaps| bitmaps.clear("a")))
    }),
    verb("bitmap --disable", |form| {
        with_bitmap(form, bitmap(|bitmaps| bitmaps.set_enabled("a", false)))
    }),
    verb("amend", |form| {
        let command = in_place(form, &[], amend(form.amend?))?;
        Some(Command {
            // A slot in use is not overwritten.
            repeatable: form.key.is_none(),
            ..command.guest_data_unchanged()
        })
    }),
    verb("check -r", repair),
];

const fn verb(name: &'static str, on: fn(&'static Form) -> Option<Command>) -> Verb {
    Verb { name, on }
}

fn raw() -> &'static Form {
    &FORMS[0]
}

fn qcow2() -> &'static Form {
    &FORMS[1]
}

/// Data in the first unit and a bit more, and in a part of the third one.
fn filled(plan: ImagePlan, form: &Form) -> ImagePlan {
    plan.data(0, form.unit + 512, 1)
        .data(2 * form.unit, form.unit / 2, 2)
}

/// Data of an overlay, in other places.
fn changed(plan: ImagePlan, form: &Form) -> ImagePlan {
    plan.data(form.unit + 100, form.unit, 3)
        .data(form.size() - 512, 512, 4)
}

/// The form of the images below overlays of the form `form`.
fn base_of(form: &Form) -> &'static Form {
    let vmdk = FORMS
        .iter()
        .find(|other| form.format == "vmdk" && other.format == "vmdk");
    vmdk.unwrap_or(raw())
}

/// An overlay, and the image below.
fn overlaid(form: &Form) -> Option<[(&'static str, ImagePlan); 2]> {
    form.can_be_overlay().then_some(())?;
    let below = base_of(form);
    let base = filled(below.plan().of_len(form.size()), form);
    Some([("top", changed(form.overlay(below.format), form)), ("base", base)])
}

/// A command on images that are there, unless the formats cannot do it.
fn on_images(
    images: &[(&str, &Form)],
    plans: &[(&str, ImagePlan)],
    run: impl Fn(&Disks) -> Result<()> + Send + Sync + 'static,
) -> Option<Command> {
    let cast = cast(images);
    let files = supported(make_cast(&cast, plans))?;
    on_files(cast, files, run)
}

fn on_files(
    cast: Arc<Cast>,
    files: Files,
    run: impl Fn(&Disks) -> Result<()> + Send + Sync + 'static,
) -> Option<Command> {
    supported(run(&Disks::of(&cast, &files)))?;
    Some(Command {
        cast,
        ..Command::new("", files, run)
    })
}

/// `None` for what a format cannot do.
fn supported<T>(outcome: Result<T>) -> Option<T> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::Unsupported || error.errno() == Some(errno::ENOTSUP) => None,
        other => Some(other.unwrap_or_else(|error| panic!("{}", error.chain()))),
    }
}

/// The same command, of which only the image called `name` is looked at.
fn looking_at(mut command: Command, name: &str) -> Command {
    for role in &mut Arc::make_mut(&mut command.cast).roles {
        role.is_image &= role.name == name;
    }
    command
}

/// The same command, which only reads the images called `names`.
fn reading(command: Command, names: &[&str]) -> Command {
    let roles = command.cast.roles.iter().enumerate();
    let sources = roles.filter(|(_, role)| names.contains(&role.name.as_str()));
    Command {
        sources: sources.map(|(index, _)| index).collect(),
        ..command
    }
}

/// A command on an image of the form with data, which only reads `sources`.
fn in_place(
    form: &'static Form,
    sources: &[(&'static str, &'static Form)],
    run: impl Fn(&Disks) -> Result<()> + Send + Sync + 'static,
) -> Option<Command> {
    form.can_change().then_some(())?;
    let mut images = vec![("top", form)];
    images.extend(sources);
    let mut plans = vec![("top", filled(form.plan(), form))];
    plans.extend(
        sources
            .iter()
            .map(|(name, source)| (*name, source_of(form, source))),
    );
    let names: Vec<&str> = sources.iter().map(|(name, _)| *name).collect();
    Some(reading(on_images(&images, &plans, run)?, &names))
}

/// The image that is copied to one of the form `form`.
fn source_of(form: &Form, source: &Form) -> ImagePlan {
    let plan = ImagePlan::new(source.format, source.options, form.size());
    changed(plan, form).data(2 * form.unit + 512, 512, 5)
}

/// A command that makes an image of the form, which only reads `sources`.
fn new(
    form: &'static Form,
    sources: &[(&'static str, &'static Form)],
    run: impl Fn(&Disks) -> Result<()> + Send + Sync + 'static,
) -> Option<Command> {
    let cast = cast(&[sources, &[("top", form)]].concat());
    let plans: Vec<_> = sources
        .iter()
        .map(|(name, source)| (*name, source_of(form, source)))
        .collect();
    let files = make_cast(&cast, &plans).expect("memory");
    let names: Vec<&str> = sources.iter().map(|(name, _)| *name).collect();
    let first = cast
        .roles
        .iter()
        .position(|role| role.name == "top")
        .expect("is there");
    Some(Command {
        nameless_from: first,
        ..reading(on_files(cast, files, run)?, &names)
    })
}

fn create(disks: &Disks, form: &Form) -> Result<()> {
    form.plan().create(disks, "top")?;
    complete(disks)
}

/// What comes before a new image gets its name: its files are durable.
fn complete(disks: &Disks) -> Result<()> {
    let roles = disks.cast.roles.iter().zip(&disks.devices);
    let mut new = roles.skip_while(|(role, _)| role.name != "top");
    new.try_for_each(|(_, device)| device.flush())
}

fn convert(disks: &Disks, form: &Form, compress: bool) -> Result<()> {
    form.plan().create(disks, "top")?;
    copy_to(disks, Order::Same, compress)?;
    complete(disks)
}

/// The order of the requests of a conversion.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// The same in each run.
    Same,
    /// Another one in each run.
    Any,
}

fn copy_to(disks: &Disks, order: Order, compress: bool) -> Result<()> {
    let is_new = disks.cast.roles[0].name != "top";
    let sources = [disks.open("source", OpenOptions::new())?];
    let target = disks.open("top", OpenOptions::new().write(true).resize(is_new))?;
    let mut conversion = Conversion::new(&sources, &target);
    conversion.compress = compress || target.layer().needs_encoding();
    conversion.target_is_zero &= is_new;
    conversion.existing_target = !is_new;
    conversion.out_of_order = order == Order::Any;
    conversion.parallel = NonZeroU32::new(1).filter(|_| order == Order::Same);
    conversion.run()?;
    flush(&target)
}

fn open(disks: &Disks) -> Result<Arc<Image>> {
    disks.open("top", OpenOptions::new().write(true))
}

/// Writes in three steps, and flushes after each of them.
fn write(disks: &Disks, form: &Form) -> Result<()> {
    let image = open(disks)?;
    let data = |at, len: u64, byte| image.write_at(&vec![byte; usize::try_from(len).expect("small")], at);
    let done = || {
        image.flush()?;
        disks.acknowledge();
        Ok(())
    };
    data(512, form.unit, 3)?;
    done()?;
    data(2 * form.unit + 100, 600, 4)?;
    image.write_zeroes(ByteRange::at(0, form.unit), ZeroMode::Unmap)?;
    done()?;
    data(form.size() - 512, 512, 5)?;
    data(form.unit, 2 * form.unit, 6)?;
    done()
}

/// Writes and zeroes random ranges, and flushes from time to time. The environment variable `CRASH_SEED` is the seed.
fn write_at_random(disks: &Disks, form: &Form) -> Result<()> {
    let seed = std::env::var("CRASH_SEED")
        .ok()
        .and_then(|seed| seed.parse::<u64>().ok());
    let mut state = seed.unwrap_or(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % limit
    };
    let image = open(disks)?;
    let mut since_flush: Vec<ByteRange> = Vec::new();
    for byte in 1..16 {
        let at = below(form.size() - 1);
        let at = if below(3) == 0 { at - at % form.unit } else { at };
        let len = if below(3) == 0 {
            form.unit
        } else {
            1 + below(form.unit + 2000)
        };
        let range = ByteRange::at(at, len.min(form.size() - at));
        // A byte that is written twice between two flushes has more values than those before and after.
        let is_written = since_flush.iter().any(|other| !other.intersect(range).is_empty());
        if is_written || below(4) == 0 {
            image.flush()?;
            disks.acknowledge();
            since_flush.clear();
        }
        since_flush.push(range);
        match below(4) {
            0 => image.write_zeroes(range, ZeroMode::Unmap)?,
            1 => image.write_zeroes(range, ZeroMode::KeepAllocated)?,
            _ => image.write_at(&vec![byte; usize::try_from(range.len()).expect("small")], at)?,
        }
    }
    image.flush()
}

fn bench(disks: &Disks, form: &Form) -> Result<()> {
    let requests = Requests::Write {
        pattern: 7,
        flush_interval: 2,
        drain: true,
    };
    let bench = Bench {
        requests,
        count: 5,
        depth: 1,
        size: 1024,
        offset: 512,
        step: form.unit,
    };
    bench.run(&*open(disks)?).map(drop)
}

fn with_snapshot(form: &'static Form, run: fn(&Disks) -> Result<()>) -> Option<Command> {
    (form.format == "qcow2").then_some(())?;
    let plan = changed(filled(form.plan(), form).snapshot("old"), form);
    on_images(&[("top", form)], &[("top", plan)], run)
}

fn with_bitmap(
    form: &'static Form,
    run: impl Fn(&Disks) -> Result<()> + Send + Sync + 'static,
) -> Option<Command> {
    (form.format == "qcow2").then_some(())?;
    let cast = cast(&[("top", form)]);
    let disks = Disks::of(
        &cast,
        &supported(make_cast(&cast, &[("top", filled(form.plan(), form))]))?,
    );
    supported(bitmap(|bitmaps| add(bitmaps, "a"))(&disks))?;
    let marked = open(&disks).and_then(|image| image.write_at(&[9; 512], 0));
    marked.expect("memory");
    on_files(cast, disks.contents(), run).map(Command::guest_data_unchanged)
}

/// A repair of what a power cut during writes has left.
fn repair(form: &'static Form) -> Option<Command> {
    let cut_off = in_place(form, &[], move |disks| write(disks, form))?;
    let journal: Arc<Journal> = Arc::default();
    let record = |(at, bytes): (usize, &Vec<u8>)| {
        Arc::new(RecordingDevice::new(bytes.clone(), at, &journal)) as Arc<dyn Device>
    };
    let devices = cut_off.files.iter().enumerate().map(record).collect();
    (cut_off.run)(&Disks::on(&cut_off.cast, devices)).expect("memory");
    let mut worst = (0, cut_off.files.clone());
    journal.some_crashes(&cut_off.files, (6, 60), 1, |crash| {
        // An image that must be repaired before it can be checked is the worst.
        let found = check(&Disks::of(&cut_off.cast, crash.files), "top", Repair::No);
        let damage = found.map_or(u64::MAX, |found| found.leaks + found.corruptions);
        if damage > worst.0 {
            worst = (damage, crash.files.to_vec());
        }
    });
    let command = on_files(cut_off.cast, worst.1, |disks| {
        let image = disks.open("top", OpenOptions::new().for_check(true).write(true))?;
        image.layer().check(Repair::All, &Progress::none())?;
        flush(&image)
    })?;
    Some(Command {
        damaged: true,
        ..command.guest_data_unchanged()
    })
}
