//! Tests of the creation of files.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use super::*;

const OLD: &[u8] = b"what was there before";
const NEW: &[u8] = b"new";

struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn with_old(self, name: &str) -> Self {
        fs::write(self.path(name), OLD).expect("writes");
        self
    }

    /// Makes the file called `name`, and writes to it.
    fn create(&self, name: &str) -> NewFile {
        let target = Target::plain(self.path(name).to_str().expect("is text"));
        let creation = FileCreation::default();
        let new = File::create(&target, Permissions::WRITE, &creation, CacheMode::UNSAFE).expect("is made");
        new.file().write_at(NEW, 0).expect("writes");
        new
    }

    /// The same on a file system where every file has a name.
    fn create_with_name(&self, name: &str) -> NewFile {
        let target = Target::plain(self.path(name).to_str().expect("is text"));
        let open = || File::open(&target, true, CacheMode::UNSAFE).ok();
        let mut unnamed = Unnamed::for_path(&self.path(name), open()).expect("is possible");
        let file = unnamed.make_temporary(CacheMode::UNSAFE).expect("is made");
        let file = File::from_open(file, &target, true, CacheMode::UNSAFE).expect("opens");
        file.write_at(NEW, 0).expect("writes");
        NewFile {
            file: Arc::new(file),
            publication: Publication::Later(Box::new(unnamed)),
        }
    }

    fn contents(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.path(name)).ok()
    }

    fn names(&self) -> Vec<String> {
        let entries = self.dir.path().read_dir().expect("lists");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("lists").file_name().into_string().expect("is text"))
            .collect();
        names.sort();
        names
    }
}

const WAYS: [fn(&Scratch, &str) -> NewFile; 2] = [Scratch::create, Scratch::create_with_name];

#[test]
fn a_file_has_its_name_once_it_is_published() {
    for create in WAYS {
        let scratch = Scratch::new();
        let new = create(&scratch, "a");
        assert_eq!(scratch.contents("a"), None);
        new.publish().expect("is possible");
        assert_eq!(scratch.contents("a").as_deref(), Some(NEW));
        assert_eq!(scratch.names(), ["a"]);
        drop(create(&scratch, "b"));
        assert_eq!(scratch.names(), ["a"]);
    }
}

#[test]
fn an_old_file_is_there_until_the_new_one_is_complete() {
    for create in WAYS {
        let scratch = Scratch::new().with_old("a");
        drop(create(&scratch, "a"));
        assert_eq!(scratch.contents("a").as_deref(), Some(OLD));
        let new = create(&scratch, "a");
        assert_eq!(scratch.contents("a").as_deref(), Some(OLD));
        new.publish().expect("is possible");
        assert_eq!(scratch.contents("a").as_deref(), Some(NEW));
        assert_eq!(scratch.names(), ["a"]);
    }
}

#[test]
fn the_mode_of_an_old_file_is_kept() {
    let scratch = Scratch::new().with_old("a");
    fs::set_permissions(scratch.path("a"), fs::Permissions::from_mode(0o640)).expect("is possible");
    scratch.create("a").publish().expect("is possible");
    let mode = scratch.path("a").metadata().expect("is there").mode();
    assert_eq!(mode & 0o7777, 0o640);
}

#[test]
fn a_file_with_two_names_is_overwritten_in_place() {
    let scratch = Scratch::new().with_old("a");
    fs::hard_link(scratch.path("a"), scratch.path("b")).expect("is possible");
    scratch.create("a").publish().expect("is possible");
    assert_eq!(scratch.contents("b").as_deref(), Some(NEW));
    drop(scratch.create("a"));
    assert_eq!(scratch.contents("b").as_deref(), Some(&b""[..]));
}

#[test]
fn a_symbolic_link_leads_to_the_new_file() {
    let scratch = Scratch::new().with_old("a");
    symlink("a", scratch.path("link")).expect("is possible");
    symlink("nothing", scratch.path("dangling")).expect("is possible");
    scratch.create("link").publish().expect("is possible");
    assert_eq!(scratch.contents("a").as_deref(), Some(NEW));
    scratch.create("dangling").publish().expect("is possible");
    assert_eq!(scratch.contents("nothing").as_deref(), Some(NEW));
    for link in ["link", "dangling"] {
        let metadata = scratch.path(link).symlink_metadata().expect("is there");
        assert!(metadata.is_symlink());
    }
}

#[test]
fn what_others_put_there_meanwhile_is_left_alone() {
    for create in WAYS {
        for had_old in [true, false] {
            for publishes in [true, false] {
                let mut scratch = Scratch::new().with_old("victim");
                if had_old {
                    scratch = scratch.with_old("a");
                }
                let new = create(&scratch, "a");
                let _ = fs::remove_file(scratch.path("a"));
                symlink("victim", scratch.path("a")).expect("is possible");
                if publishes {
                    let error = new.publish().expect_err("is somebody else's").chain();
                    assert!(error.ends_with("a': File exists"), "{error}");
                } else {
                    drop(new);
                }
                assert_eq!(scratch.contents("victim").as_deref(), Some(OLD));
                assert_eq!(scratch.names(), ["a", "victim"]);
            }
        }
    }
}

#[test]
fn a_file_that_was_replaced_is_not_removed() {
    let scratch = Scratch::new();
    symlink("made", scratch.path("a")).expect("is possible");
    let new = scratch.create("a");
    assert!(matches!(new.publication, Publication::InPlace { .. }));
    fs::remove_file(scratch.path("a")).expect("is possible");
    fs::write(scratch.path("a"), OLD).expect("writes");
    drop(new);
    assert_eq!(scratch.contents("a").as_deref(), Some(OLD));
}

#[test]
fn an_old_file_in_use_stays() {
    let scratch = Scratch::new().with_old("a");
    let target = Target::plain(scratch.path("a").to_str().expect("is text"));
    let holder = File::open(&target, true, CacheMode::UNSAFE).expect("opens");
    holder.lock(Permissions::WRITE).expect("locks");
    let creation = FileCreation::default();
    let error =
        File::create(&target, Permissions::WRITE, &creation, CacheMode::UNSAFE).expect_err("is in use");
    assert_eq!(error.kind(), diskimage_core::ErrorKind::Locked);
    assert_eq!(scratch.contents("a").as_deref(), Some(OLD));
    // The new file is locked against others like any image.
    drop(holder);
    let new = scratch.create("a");
    let other = File::open(&target, true, CacheMode::UNSAFE).expect("opens");
    assert!(other.lock(Permissions::WRITE).is_err());
    drop(new);
    assert!(other.lock(Permissions::WRITE).is_ok());
}

/// The names in the directory and the contents, without files that were set aside.
fn visible(scratch: &Scratch) -> BTreeMap<String, Vec<u8>> {
    let names = scratch.names();
    let named = names.into_iter().filter(|name| !name.starts_with(".qemu-img-"));
    named
        .map(|name| {
            let contents = scratch.contents(&name).expect("is there");
            (name, contents)
        })
        .collect()
}

/// The files of an image, the first of which refers to the others, where `old` are there.
fn image(create: fn(&Scratch, &str) -> NewFile, old: &[&str]) -> (Scratch, Vec<NewFile>) {
    let scratch = old
        .iter()
        .fold(Scratch::new(), |scratch, name| scratch.with_old(name));
    let files = ["image", "part 1", "part 2"].map(|name| create(&scratch, name));
    (scratch, files.into())
}

/// All choices of files of the same names that were there before.
const OLD_FILES: [&[&str]; 8] = [
    &[],
    &["image"],
    &["part 1"],
    &["part 2"],
    &["image", "part 1"],
    &["image", "part 2"],
    &["part 1", "part 2"],
    &["image", "part 1", "part 2"],
];

#[test]
fn an_image_that_can_be_opened_has_its_own_parts_at_each_moment() {
    for create in WAYS {
        for old in OLD_FILES {
            let (scratch, files) = image(create, old);
            let is = |now: &BTreeMap<String, Vec<u8>>, name: &str, what: &[u8]| {
                now.get(name).is_some_and(|contents| contents == what)
            };
            let mut steps = Vec::new();
            NewFile::publish_in_steps(files, |step| {
                steps.push(step);
                // What is left if the program is killed now.
                let now = visible(&scratch);
                let (image_is_old, image_is_new) = (is(&now, "image", OLD), is(&now, "image", NEW));
                for part in ["part 1", "part 2"] {
                    // An image whose part was missing could not be opened.
                    let fits = !image_is_old || !old.contains(&part) || is(&now, part, OLD);
                    assert!(fits, "{old:?}: {steps:?}: {now:?}");
                    assert!(
                        !image_is_new || is(&now, part, NEW),
                        "{old:?}: {steps:?}: {now:?}"
                    );
                }
                Ok(())
            })
            .expect("is possible");
            let now = visible(&scratch);
            assert_eq!(scratch.names(), ["image", "part 1", "part 2"], "{old:?}");
            assert!(now.values().all(|contents| contents == NEW), "{old:?}: {now:?}");
            // What has a name is durable, and named before what refers to it.
            let at = |step| steps.iter().rposition(|other| *other == step);
            assert!(steps.starts_with(&[Step::Flush; 3]), "{old:?}: {steps:?}");
            assert!(steps.ends_with(&[Step::SyncDirectory, Step::Name, Step::SyncDirectory]));
            assert!(at(Step::SetAside) < at(Step::Name));
        }
    }
}

#[test]
fn a_failure_between_the_names_leaves_what_was_there() {
    for create in WAYS {
        for old in OLD_FILES {
            for failing in 0.. {
                let (scratch, files) = image(create, old);
                let before = visible(&scratch);
                let mut steps = 0;
                let outcome = NewFile::publish_in_steps(files, |_| {
                    steps += 1;
                    match steps > failing {
                        true => Err(Error::from_errno(libc::EIO)),
                        false => Ok(()),
                    }
                });
                if outcome.is_ok() {
                    assert!(failing > 6, "{failing} steps");
                    break;
                }
                // The step after the last name has nothing to undo.
                let is_named = scratch.contents("image").as_deref() == Some(NEW);
                assert!(is_named || visible(&scratch) == before, "{old:?}: {failing}");
                assert!(
                    scratch.names().iter().all(|name| !name.starts_with(".qemu-img-")),
                    "{old:?}: {failing}"
                );
            }
        }
    }
}
