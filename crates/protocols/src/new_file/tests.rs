//! Tests of the creation of files.

use std::os::unix::fs::symlink;

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
