//! Tests of the codec in both directions, on byte strings.

use diskimage_core::{ByteRange, NodeOptions};

use super::super::address::{Address, Inet};
use super::super::negotiate::{ClientOptions, Export, Handshake, Next, ReplyMode};
use super::super::reply::{Assembly, Head, HeadKind, Outcome, StatusExtent, Step};
use super::super::request::{Command, encode};
use super::super::uri;

/// Bytes from text: numbers in hex; `|` and spaces are ignored.
fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

const HELLO: &str = "4e42444d41474943 49484156454f5054";
const REPLY: &str = "0003e889045565a9";

fn client_options(export: &str) -> ClientOptions {
    ClientOptions {
        export: export.to_owned(),
        tls: false,
        context: "base:allocation".to_owned(),
    }
}

/// Feeds the messages of a server. Returns all bytes that the client sent, and the outcome.
fn talk(client_options: ClientOptions, server: &str) -> (Vec<u8>, Result<Option<Export>, String>) {
    let mut handshake = Handshake::new(client_options);
    let server = bytes(server);
    let mut rest = &server[..];
    let mut said = Vec::new();
    loop {
        let Some((head, tail)) = rest.split_at_checked(handshake.wanted()) else {
            return (said, Ok(None));
        };
        rest = tail;
        let next = match handshake.take(head) {
            Ok(next) => next,
            Err(error) => return (said, Err(error.chain())),
        };
        said.extend(handshake.output());
        match next {
            Next::Read => {}
            Next::StartTls => {
                handshake.secured();
                said.extend(handshake.output());
            }
            Next::Done => return (said, Ok(Some(handshake.finish()))),
        }
    }
}

#[test]
fn every_feature_of_a_server_is_negotiated() {
    let server = format!(
        "{HELLO} 0003
         {REPLY} 0000000b 00000001 00000000
         {REPLY} 0000000a 00000004 00000013 00000007 626173653a616c6c6f636174696f6e
         {REPLY} 0000000a 00000001 00000000
         {REPLY} 00000007 00000003 0000000e 0003 00000200 00001000 02000000
         {REPLY} 00000007 00000003 0000000c 0000 0000000000100000 014d
         {REPLY} 00000007 00000001 00000000"
    );
    let (said, export) = talk(client_options("x"), &server);
    assert_eq!(
        export,
        Ok(Some(Export {
            len: 1 << 20,
            flags: 0x14d,
            min_block: 512,
            max_block: 32 << 20,
            reply_mode: ReplyMode::Extended,
            context: Some(7),
        }))
    );
    let option = "49484156454f5054";
    let expected = format!(
        "00000003
         {option} 0000000b 00000000
         {option} 0000000a 0000001c 00000001 78 00000001 0000000f 626173653a616c6c6f636174696f6e
         {option} 00000007 00000009 00000001 78 0001 0003"
    );
    assert_eq!(said, bytes(&expected));
}

#[test]
fn a_server_without_go_gets_export_name() {
    let refuse = |option: &str| format!("{REPLY} {option} 80000001 00000000");
    let server = format!(
        "{HELLO} 0001 {} {} {} 0000000000000200 0003 {}",
        refuse("0000000b"),
        refuse("00000008"),
        refuse("00000007"),
        "00".repeat(124)
    );
    let (_, export) = talk(client_options(""), &server);
    let export = export.unwrap().unwrap();
    assert_eq!(
        (export.len, export.flags, export.reply_mode, export.context),
        (512, 3, ReplyMode::Simple, None)
    );
}

#[test]
fn oldstyle_servers_have_one_unnamed_export() {
    let server = format!(
        "4e42444d41474943 0000420281861253 0000000000000200 00000003 {}",
        "00".repeat(124)
    );
    let (said, export) = talk(client_options(""), &server);
    assert_eq!((said.len(), export.unwrap().unwrap().len), (0, 512));
    let (_, export) = talk(client_options("x"), &server);
    assert_eq!(
        export,
        Err("Server does not support non-empty export names".to_owned())
    );
}

#[test]
fn starttls_is_the_first_option() {
    let secret = ClientOptions {
        tls: true,
        ..client_options("")
    };
    let (said, _) = talk(
        secret.clone(),
        &format!("{HELLO} 0003 {REPLY} 00000005 00000001 00000000"),
    );
    let option = "49484156454f5054";
    assert_eq!(
        said,
        bytes(&format!(
            "00000003 {option} 00000005 00000000 {option} 0000000b 00000000"
        ))
    );
    for (server, message) in [
        (format!("{HELLO} 0002"), "Server does not support STARTTLS"),
        (
            format!("4e42444d41474943 0000420281861253 {}", "00".repeat(136)),
            "Server does not support STARTTLS",
        ),
        (
            format!("{HELLO} 0003 {REPLY} 00000005 80000001 00000000"),
            "Server don't support STARTTLS option",
        ),
        (
            format!("{HELLO} 0003 {REPLY} 00000005 80000002 00000000"),
            "Denied by server for option 5 (starttls)",
        ),
    ] {
        assert_eq!(talk(secret.clone(), &server).1, Err(message.to_owned()));
    }
}

#[test]
fn invalid_servers_are_refused() {
    let no_more =
        format!("{HELLO} 0003 {REPLY} 0000000b 80000001 00000000 {REPLY} 00000008 80000001 00000000");
    for (server, message) in [
        ("41".repeat(16), "Bad initial magic received: 0x4141414141414141"),
        (
            format!("4e42444d41474943 {}", "42".repeat(8)),
            "Bad server magic received: 0x4242424242424242",
        ),
        (
            format!("{HELLO} 0003 {}", "58".repeat(20)),
            "Unexpected option reply magic",
        ),
        (
            format!("{HELLO} 0003 {REPLY} 0000000c 00000001 00000000"),
            "Unexpected option type 12 (<unknown>), expected 11 (extended headers)",
        ),
        (
            format!("{HELLO} 0003 {REPLY} 0000000b 00000001 40000000"),
            "Option 11 ('extended headers') response length is 1073741824 (it should be zero)",
        ),
        (
            format!("{HELLO} 0003 {REPLY} 0000000b 00000003 40000000"),
            "option reply of 1073741824 bytes is too long",
        ),
        (
            format!("{no_more} {REPLY} 00000007 00000001 00000000"),
            "broken server omitted NBD_INFO_EXPORT",
        ),
        (
            format!("{no_more} {REPLY} 00000007 00000003 00000001 00"),
            "NBD_REP_INFO length 1 is too short",
        ),
        (
            format!("{no_more} {REPLY} 00000007 00000003 0000000c 0000 ffffffffffffffff 0001"),
            "export length 0xffffffffffffffff is too large",
        ),
        (
            format!("{no_more} {REPLY} 00000007 00000003 0000000e 0003 00000003 00001000 02000000"),
            "server minimum block size 3 is not a power of two",
        ),
        (
            format!("{no_more} {REPLY} 00000007 00000003 0000000e 0003 00000200 00001000 00000100"),
            "server maximum block size 256 is not valid",
        ),
        (
            format!("{no_more} {REPLY} 00000007 80000006 00000000"),
            "Requested export not available",
        ),
    ] {
        assert_eq!(
            talk(client_options("x"), &server).1,
            Err(message.to_owned()),
            "{server}"
        );
    }
}

#[test]
fn endless_option_replies_are_an_error() {
    let info = format!("{REPLY} 00000007 00000003 00000002 0001");
    let server = format!(
        "{HELLO} 0003 {REPLY} 0000000b 80000001 00000000 {REPLY} 00000008 80000001 00000000 {}",
        info.repeat(2000)
    );
    assert_eq!(
        talk(client_options(""), &server).1,
        Err("The server does not come to an end with its options".to_owned())
    );
}

#[test]
fn requests_have_two_encodings() {
    let range = ByteRange::at(0x1000, 0x200);
    let request = |reply_mode, command| encode(reply_mode, command, 5, range);
    assert_eq!(
        request(ReplyMode::Structured, Command::Read),
        bytes("25609513 0000 0000 0000000000000005 0000000000001000 00000200")
    );
    assert_eq!(
        request(ReplyMode::Extended, Command::Write),
        bytes("21e41c71 0020 0001 0000000000000005 0000000000001000 0000000000000200")
    );
    let zeroes = Command::WriteZeroes {
        no_hole: true,
        fast: true,
    };
    assert_eq!(
        request(ReplyMode::Simple, zeroes),
        bytes("25609513 0012 0006 0000000000000005 0000000000001000 00000200")
    );
}

#[test]
fn heads_are_parsed_in_all_reply_modes() {
    let head = |reply_mode, text: &str| {
        let head = bytes(text);
        assert_eq!(Head::len_of(&head[..16], reply_mode).unwrap(), head.len());
        Head::parse(&head).unwrap()
    };
    assert_eq!(
        head(ReplyMode::Simple, "67446698 00000005 0000000000000007"),
        Head {
            cookie: 7,
            kind: HeadKind::Simple { error: 5 }
        }
    );
    let chunk = Head {
        cookie: 7,
        kind: HeadKind::Chunk {
            done: true,
            kind: 1,
            len: 0x208,
        },
    };
    assert_eq!(
        head(
            ReplyMode::Structured,
            "668e33ef 0001 0001 0000000000000007 00000208"
        ),
        chunk
    );
    assert_eq!(
        head(
            ReplyMode::Extended,
            "6e8a278c 0001 0001 0000000000000007 0000000000001000 0000000000000208"
        ),
        chunk
    );
    for reply_mode in [ReplyMode::Simple, ReplyMode::Structured] {
        assert!(Head::len_of(&bytes("6e8a278c 0001 0001 0000000000000007"), reply_mode).is_err());
    }
    assert!(Head::len_of(&bytes("67446698 00000005 0000000000000007"), ReplyMode::Extended).is_err());
}

fn reading(len: u64) -> Assembly {
    let data = vec![0xff; usize::try_from(len).unwrap()];
    Assembly::new(
        Command::Read,
        ByteRange::at(100, len),
        ReplyMode::Structured,
        None,
        data,
    )
}

#[test]
fn data_is_accepted_in_any_order() {
    let mut assembly = reading(10);
    assembly.destination(105, 3).unwrap().copy_from_slice(b"fgh");
    assembly.chunk(2, &bytes("0000000000000064 00000002")).unwrap();
    assembly.destination(108, 2).unwrap().copy_from_slice(b"ij");
    assembly.destination(102, 3).unwrap().copy_from_slice(b"cde");
    assert_eq!(assembly.finish(), Outcome::Data(b"\0\0cdefghij".to_vec()));
}

#[test]
fn missing_duplicate_and_foreign_data_are_errors() {
    let mut assembly = reading(10);
    assembly.destination(100, 5).unwrap();
    assert!(matches!(assembly.finish(), Outcome::Broken(5, _)));
    let mut assembly = reading(10);
    assembly.destination(100, 5).unwrap();
    assert!(assembly.destination(104, 2).is_err());
    assert!(reading(10).destination(99, 5).is_err());
    assert!(reading(10).destination(109, 2).is_err());
    assert!(reading(10).destination(u64::MAX, 2).is_err());
    let too_long = HeadKind::Chunk {
        done: true,
        kind: 1,
        len: 19,
    };
    assert!(reading(10).step(too_long).is_err());
    let huge = HeadKind::Chunk {
        done: true,
        kind: 5,
        len: 1 << 40,
    };
    assert!(reading(10).step(huge).is_err());
    assert!(reading(10).step(HeadKind::Simple { error: 0 }).is_err());
}

#[test]
fn out_of_order_ranges_are_limited() {
    let mut assembly = reading(100_000);
    let outcome = (0..50_000).try_for_each(|at| assembly.destination(100 + 2 * at, 1).map(|_| ()));
    assert!(outcome.is_err());
}

#[test]
fn errors_are_those_of_the_protocol() {
    let refused = |error: &str| {
        let mut assembly = reading(10);
        assembly
            .chunk(0x8001, &bytes(&format!("{error} 0003 626164")))
            .unwrap();
        assembly.finish()
    };
    assert_eq!(refused("0000001c"), Outcome::Refused(28));
    assert_eq!(refused("00000063"), Outcome::Refused(22));
    assert!(reading(10).chunk(0x8001, &bytes("00000000 0000")).is_err());
    assert!(reading(10).chunk(0x8001, &bytes("00000005 0009 6162")).is_err());
    let mut assembly = reading(10);
    assert_eq!(
        assembly.step(HeadKind::Simple { error: 5 }).unwrap(),
        Step::Nothing { done: true }
    );
    assert_eq!(assembly.finish(), Outcome::Refused(5));
}

#[test]
fn status_is_cut_at_the_end_of_the_request() {
    let asking = |reply_mode| {
        Assembly::new(
            Command::BlockStatus,
            ByteRange::at(0, 1000),
            reply_mode,
            Some(7),
            Vec::new(),
        )
    };
    let mut assembly = asking(ReplyMode::Structured);
    assembly
        .chunk(
            5,
            &bytes("00000007 000001f4 00000000 0000ffff 00000003 00000001 00000000"),
        )
        .unwrap();
    let runs = vec![
        StatusExtent { len: 500, flags: 0 },
        StatusExtent { len: 500, flags: 3 },
    ];
    assert_eq!(assembly.finish(), Outcome::Status(runs));
    let mut assembly = asking(ReplyMode::Extended);
    assembly
        .chunk(6, &bytes("00000007 00000001 00000000000003e8 0000000000000003"))
        .unwrap();
    assert_eq!(
        assembly.finish(),
        Outcome::Status(vec![StatusExtent { len: 1000, flags: 3 }])
    );
    for (reply_mode, kind, payload) in [
        (ReplyMode::Structured, 5, "00000008 000001f4 00000000"),
        (ReplyMode::Structured, 5, "00000007"),
        (ReplyMode::Structured, 5, "00000007 00000000 00000000"),
        (ReplyMode::Structured, 5, "00000007 000001"),
        (
            ReplyMode::Structured,
            6,
            "00000007 00000001 00000000000003e8 0000000000000003",
        ),
        (ReplyMode::Extended, 5, "00000007 000001f4 00000000"),
        (
            ReplyMode::Extended,
            6,
            "00000007 00000002 00000000000003e8 0000000000000003",
        ),
    ] {
        assert!(
            asking(reply_mode).chunk(kind, &bytes(payload)).is_err(),
            "{payload}"
        );
    }
    assert!(matches!(
        asking(ReplyMode::Structured).finish(),
        Outcome::Broken(..)
    ));
}

fn options(name: &str) -> Result<String, String> {
    uri::parse(name)
        .map(|options: NodeOptions| {
            let list = options
                .iter()
                .map(|(name, value)| format!("{name}={}", value.compact()));
            list.collect::<Vec<_>>().join(",")
        })
        .map_err(|error| error.chain())
}

#[test]
fn names_become_options() {
    for (name, json) in [
        ("nbd://h/a%20b", r#"export="a b",host="h",port="10809""#),
        ("nbd+tcp://[::1]:5", r#"host="::1",port="5""#),
        ("nbd+unix:///x?socket=/s", r#"export="x",path="/s""#),
        (
            "nbd+unix:///x?socket=%E9\u{10ffe9}",
            "export=\"x\",path=\"\u{10ffe9}\u{10ffe9}\"",
        ),
        ("nbd:h:5:exportname=a:b", r#"export="a:b",host="h",port="5""#),
        ("nbd:unix:/s:t", r#"path="/s:t""#),
        ("nbd:", ""),
    ] {
        assert_eq!(options(name).as_deref(), Ok(json), "{name}");
    }
    for name in [
        "nbd://",
        "nbd://h:99999/",
        "nbd://h/?x=y",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=/s&socket=/t",
        "nbd+unix://h/x?socket=/s",
        "nbd://h/%0",
        "nbd://h/%+1",
        "nbd://h/%00",
        "nbd://h/%ff",
        "nbd://h/\u{10ffe9}",
        "nbd+unix:///x%e9?socket=/s",
    ] {
        assert_eq!(options(name), Err("No valid URL specified".to_owned()), "{name}");
    }
    assert_eq!(options("nbd:h"), Err("error parsing address 'h'".to_owned()));
}

#[test]
fn exports_are_shown_as_uris() {
    let inet = Address::Inet(Inet {
        host: "h".to_owned(),
        port: "1".to_owned(),
        ..Inet::default()
    });
    assert_eq!(uri::show(&inet, ""), "nbd://h:1");
    assert_eq!(uri::show(&inet, "x"), "nbd://h:1/x");
    let unix = Address::Unix("/s".to_owned());
    assert_eq!(uri::show(&unix, ""), "nbd+unix://?socket=/s");
    assert_eq!(uri::show(&unix, "x"), "nbd+unix:///x?socket=/s");
}
