//! Images with random damage, read by this program and by the stock `qemu-img`. Where both succeed they say the same; this
//! program refuses what the other one reads only where it can say what is damaged.
//!
//! `DAMAGED_IMAGES` is the number of images, `DAMAGED_SEED` the seed. Limits are set by `timeout` and `prlimit`.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

const OURS: &str = env!("CARGO_BIN_EXE_qemu-img");
const STOCK: &str = "qemu-img";

/// The forms of the images: the words that make one of them of the disk, and the name of the format.
const FORMS: [(&str, &str); 12] = [
    ("qcow2", "convert -O qcow2 -o cluster_size=512"),
    ("qcow2", "convert -O qcow2 -o cluster_size=1k,compat=0.10"),
    ("qcow2", "convert -c -O qcow2 -o cluster_size=4k"),
    (
        "qcow2",
        "convert -c -O qcow2 -o cluster_size=4k,compression_type=zstd",
    ),
    ("qcow2", "convert -O qcow2 -o cluster_size=16k,extended_l2=on"),
    ("qcow", "convert -O qcow"),
    ("qcow", "convert -c -O qcow"),
    ("qed", "convert -O qed -o cluster_size=4k,table_size=2"),
    ("vdi", "convert -O vdi"),
    ("vmdk", "convert -O vmdk"),
    ("vmdk", "convert -O vmdk -o subformat=streamOptimized"),
    ("parallels", "convert -O parallels"),
];

/// What this program says of damage that the stock `qemu-img` reads over: as zeroes, or as what happens to be there.
const DAMAGE: [&str; 6] = [
    "overlaps the header",
    "looks cut off",
    // A second-level table of qcow that is not there.
    "Input/output error",
    "reaches beyond the end of the file",
    "unsupported VDI image",
    "lies in the grain directory of the image",
];

/// What one program has said about an image.
struct Answers {
    info: Output,
    map: Output,
    check: Output,
    convert: Output,
    /// The disk, if it was converted.
    disk: Option<Vec<u8>>,
}

impl Answers {
    fn of(tool: &str, format: &str, dir: &Path) -> Self {
        let run = |words: &str| {
            let limits = ["20", "prlimit", "--as=2147483648", "--fsize=67108864", tool];
            let words = words.replace("FORMAT", format);
            let output = Command::new("timeout")
                .args(limits)
                .args(words.split(' '))
                .current_dir(dir)
                .output();
            output.expect("timeout of coreutils is there")
        };
        let convert = run("convert -f FORMAT -O raw image disk");
        let disk = convert.status.success().then(|| fs::read(dir.join("disk")));
        let _ = fs::remove_file(dir.join("disk"));
        Self {
            info: run("info -f FORMAT --output=json image"),
            map: run("map -f FORMAT --output=json image"),
            check: run("check -f FORMAT image"),
            convert,
            disk: disk.map(|disk| disk.expect("is read")),
        }
    }

    fn outputs(&self) -> [(&'static str, &Output); 4] {
        [
            ("info", &self.info),
            ("map", &self.map),
            ("check", &self.check),
            ("convert", &self.convert),
        ]
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What is wrong with our answers.
fn defects(ours: &Answers, stock: &Answers) -> Vec<String> {
    let mut defects = Vec::new();
    for ((name, output), (_, other)) in ours.outputs().into_iter().zip(stock.outputs()) {
        let said = text(&output.stderr);
        if !matches!(output.status.code(), Some(0..=3 | 63)) || said.contains("panicked") {
            defects.push(format!("{name}: {} {said}", output.status));
        }
        let names_damage = DAMAGE.iter().any(|words| said.contains(words));
        if name != "check" && !output.status.success() && other.status.success() && !names_damage {
            defects.push(format!("{name}: refused: {said}"));
        }
    }
    let found = |answers: &Answers| matches!(answers.check.status.code(), Some(2 | 3));
    if found(stock) && ours.check.status.success() {
        defects.push(format!("check: misses {}", text(&stock.check.stdout)));
    }
    let (Some(disk), Some(other)) = (&ours.disk, &stock.disk) else {
        return defects;
    };
    if disk != other {
        defects.push("convert: another disk".to_owned());
    }
    if stock.map.status.success() && ours.map.stdout != stock.map.stdout {
        defects.push(format!(
            "map: {}and not {}",
            text(&ours.map.stdout),
            text(&stock.map.stdout)
        ));
    }
    // Room in the file system depends on when it was written.
    let facts = |output: &Output| {
        let lines = text(&output.stdout);
        let kept = lines.lines().filter(|line| !line.contains("\"actual-size\""));
        kept.map(str::to_owned).collect::<Vec<_>>()
    };
    let warned = text(&ours.info.stderr).contains("warning");
    if stock.info.status.success() && !warned && facts(&ours.info) != facts(&stock.info) {
        defects.push(format!(
            "info: {}and not {}",
            text(&ours.info.stdout),
            text(&stock.info.stdout)
        ));
    }
    defects
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % limit as u64).expect("below a usize")
    }

    /// Damages some bytes, most of them of tables, or cuts the file.
    fn damage(&mut self, image: &mut Vec<u8>) {
        for _ in 0..[1, 1, 1, 2, 4][self.below(5)] {
            let len = image.len();
            let mut at = match self.below(10) {
                0..2 => self.below(len.min(512)),
                2..4 => self.below(len),
                _ => self.below(len.min(70_000)),
            };
            if self.below(3) > 0 {
                // Where there is something.
                at = (at..len).find(|at| image[*at] != 0).unwrap_or(at);
            }
            image[at] = match self.below(10) {
                0..4 => image[at] ^ 1 << self.below(8),
                4..7 => [0, 1, 2, 3, 7, 0x10, 0x7f, 0x80, 0xff][self.below(9)],
                _ => u8::try_from(self.below(256)).expect("a byte"),
            };
        }
        if self.below(10) == 0 {
            image.truncate(1 + self.below(image.len() - 1));
        }
    }
}

/// 64 KiB of text, of zeroes and of noise.
fn disk(random: &mut Random) -> Vec<u8> {
    let noise = (0..65536).map(|_| u8::try_from(random.below(256)).expect("a byte"));
    let noise: Vec<u8> = noise.collect();
    [b"text".repeat(16384), vec![0; 65536], noise].concat()
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|number| number.parse().ok())
        .unwrap_or(default)
}

#[test]
fn both_programs_say_the_same_of_damaged_images() {
    if Command::new(STOCK).arg("--version").output().is_err() {
        let required = std::env::var_os("REQUIRE_STOCK_TOOLS").is_some_and(|value| value == "1");
        assert!(
            !required,
            "qemu-img is required (REQUIRE_STOCK_TOOLS=1) and not installed"
        );
        // Past the test harness, which captures `eprintln!`.
        let _ = writeln!(std::io::stderr(), "skipped: the stock qemu-img is not installed");
        return;
    }
    let place = tempfile::tempdir().expect("there is one");
    let dir = place.path();
    let mut random = Random(number("DAMAGED_SEED", 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    fs::write(dir.join("source"), disk(&mut random)).expect("is written");
    let made: Vec<(&str, Vec<u8>)> = FORMS
        .iter()
        .map(|(format, words)| {
            let made = Command::new(OURS)
                .args(words.split(' '))
                .args(["-f", "raw", "source", "image"])
                .current_dir(dir)
                .status();
            assert!(made.expect("runs").success(), "{words}");
            (*format, fs::read(dir.join("image")).expect("is read"))
        })
        .collect();
    let (mut read, mut refused, mut found) = (0, 0, Vec::new());
    let images = number("DAMAGED_IMAGES", 150);
    for nth in 0..images {
        let (format, sound) = &made[random.below(made.len())];
        let mut image = sound.clone();
        random.damage(&mut image);
        fs::write(dir.join("image"), &image).expect("is written");
        let (ours, stock) = (Answers::of(OURS, format, dir), Answers::of(STOCK, format, dir));
        read += u64::from(ours.disk.is_some());
        refused += u64::from(ours.disk.is_none());
        for defect in defects(&ours, &stock) {
            let kept = std::env::temp_dir().join(format!("damaged-{format}-{nth}"));
            fs::write(&kept, &image).expect("is written");
            found.push(format!("{}: {defect}", kept.display()));
        }
    }
    println!("{images} images: {read} read, {refused} refused");
    assert!(found.is_empty(), "{} defects\n{}", found.len(), found.join("\n"));
}
