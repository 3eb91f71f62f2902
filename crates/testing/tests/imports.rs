//! No file of a crate imports another one in a circle. A file may always name what the modules that contain it define:
//! a part of a driver names the driver's types. Names are followed through re-exports to the file that defines them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The path of a module inside its crate.
type Module = Vec<String>;

/// Modules that are compiled for tests only.
const TEST_MODULES: &[&str] = &["tests", "testing", "crash_tests", "damage", "cut_off"];

/// The traits of the core name each other: a device can be an image, which has a layer, which has a device.
const ONE_IDEA: &[&str] = &["device", "gate", "image", "layer"];

/// The files of a crate, without comments and tests.
fn files(directory: &Path, module: &Module, found: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(directory).expect("is a directory") {
        let path = entry.expect("is readable").path();
        let name = path.file_stem().and_then(|name| name.to_str()).expect("is text");
        let mut inner = module.clone();
        if !matches!(name, "lib" | "main" | "mod") {
            inner.push(name.to_owned());
        }
        if TEST_MODULES.contains(&name) {
            continue;
        }
        if path.is_dir() {
            files(&path, &inner, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("is text");
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            found.insert(inner, code.collect::<Vec<_>>().join("\n"));
        }
    }
}

/// The names of `a::{b, c::{d as e}}`: `a::b` as `b`, `a::c::d` as `e`.
fn expand(text: &str, prefix: &str, names: &mut Vec<(String, String)>) {
    if let Some((head, list)) = text.split_once('{') {
        let (list, prefix) = (
            list.trim_end().trim_end_matches('}'),
            format!("{prefix}{}", head.trim()),
        );
        let (mut depth, mut start) = (0, 0);
        for (at, c) in list.char_indices().chain([(list.len(), ',')]) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    expand(list[start..at].trim(), &prefix, names);
                    start = at + 1;
                }
                _ => {}
            }
        }
    } else if !text.is_empty() {
        let (path, alias) = text.split_once(" as ").unwrap_or((text, ""));
        let path = format!("{prefix}{path}").trim_end_matches("::self").to_owned();
        let last = path.rsplit("::").next().unwrap_or_default().to_owned();
        names.push((
            path,
            if alias.is_empty() {
                last
            } else {
                alias.trim().to_owned()
            },
        ));
    }
}

/// The imports of a file and the other paths in it, each with the name that it has there.
fn paths(code: &str) -> (Vec<(String, String)>, Vec<String>) {
    let (mut imports, mut rest) = (Vec::new(), String::new());
    for statement in code.split_inclusive(';') {
        let line = statement.lines().map(str::trim).collect::<Vec<_>>().join(" ");
        match line
            .rsplit_once("use ")
            .filter(|(before, _)| before.is_empty() || before.ends_with([' ', '}']))
        {
            Some((before, list)) if statement.ends_with(';') && !list.contains(['(', '=', '"']) => {
                rest.push_str(before);
                expand(list.trim_end_matches(';').trim(), "", &mut imports);
            }
            _ => rest.push_str(&line),
        }
    }
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let others = rest.split(|c| !is_path(c)).filter(|word| word.contains("::"));
    (imports, others.map(str::to_owned).collect())
}

struct Crate {
    files: BTreeMap<Module, String>,
    /// What a module imports: the path of each name.
    imports: BTreeMap<(Module, String), Module>,
}

impl Crate {
    fn read(source: &Path) -> Self {
        let mut this = Self {
            files: BTreeMap::new(),
            imports: BTreeMap::new(),
        };
        files(source, &Vec::new(), &mut this.files);
        for (module, code) in &this.files {
            for (path, name) in paths(code).0 {
                if let Some(path) = this.absolute(module, &path) {
                    this.imports.insert((module.clone(), name), path);
                }
            }
        }
        this
    }

    /// The path from the crate's root, if `path` in `module` leads into this crate.
    fn absolute(&self, module: &Module, path: &str) -> Option<Module> {
        let mut base = module.clone();
        let mut words = path.split("::").filter(|word| !word.is_empty()).peekable();
        match *words.peek()? {
            "crate" => base.clear(),
            "self" => {}
            "super" => {
                while words.next_if_eq(&"super").is_some() {
                    base.pop()?;
                }
                base.extend(words.map(str::to_owned));
                return Some(base);
            }
            child => {
                let inner = [&base[..], &[child.to_owned()]].concat();
                return self
                    .files
                    .contains_key(&inner)
                    .then(|| [&base[..], &words.map(str::to_owned).collect::<Vec<_>>()].concat());
            }
        }
        base.extend(words.skip(1).map(str::to_owned));
        Some(base)
    }

    /// The file that defines what `path` leads to.
    fn definer(&self, path: &Module, depth: u32) -> Module {
        let mut module = Module::new();
        for (at, word) in path.iter().enumerate() {
            module.push(word.clone());
            if self.files.contains_key(&module) {
                continue;
            }
            module.pop();
            return match self.imports.get(&(module.clone(), word.clone())) {
                Some(next) if depth > 0 => self.definer(&[&next[..], &path[at + 1..]].concat(), depth - 1),
                _ => module,
            };
        }
        module
    }

    /// The files that each file names, apart from the modules that contain it.
    fn uses(&self) -> BTreeMap<&Module, BTreeSet<Module>> {
        let of = |module: &Module, code: &str| {
            let (imports, others) = paths(code);
            let names = imports.into_iter().map(|(path, _)| path).chain(others);
            let files = names.filter_map(|path| Some(self.definer(&self.absolute(module, &path)?, 8)));
            files.filter(|file| !module.starts_with(file)).collect()
        };
        self.files
            .iter()
            .map(|(module, code)| (module, of(module, code)))
            .collect()
    }
}

/// A circle through `module`, if `path`, which leads there, can be continued to one.
fn circle(
    uses: &BTreeMap<&Module, BTreeSet<Module>>,
    path: &mut Vec<Module>,
    done: &mut BTreeSet<Module>,
) -> bool {
    let module = path.last().expect("has a start").clone();
    for next in &uses[&module] {
        if path.contains(next) {
            path.push(next.clone());
            return true;
        }
        if !done.contains(next) {
            path.push(next.clone());
            if circle(uses, path, done) {
                return true;
            }
            path.pop();
        }
    }
    done.insert(module);
    false
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("is in a folder");
    for name in ["core", "formats", "protocols", "diskimage", "cli"] {
        let mut all = Crate::read(&crates.join(name).join("src"));
        assert!(all.files.len() > 20, "{name} is there");
        if name == "core" {
            all.files.retain(|module, _| {
                !ONE_IDEA
                    .iter()
                    .any(|idea| module.ends_with(&[(*idea).to_owned()]))
            });
        }
        let uses = all.uses();
        let mut done = BTreeSet::new();
        for module in all.files.keys().filter(|module| !module.is_empty()) {
            let mut path = vec![module.clone()];
            let found = circle(&uses, &mut path, &mut done);
            let shown: Vec<_> = path.iter().map(|module| module.join("::")).collect();
            assert!(!found, "{name}: {}", shown.join(" -> "));
        }
    }
}
