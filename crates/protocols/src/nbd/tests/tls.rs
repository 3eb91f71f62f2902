//! Tests of TLS with the installed `qemu-nbd` and certificates made by `certtool`.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use diskimage_core::{Device, NodeOptions, Object, Objects, Result, TlsCreds, TlsKind};

use super::super::Nbd;

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn certtool(dir: &Path, args: &[&str]) -> bool {
    let status = Command::new("certtool")
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// Creates a directory with an authority, and a certificate for `name` that it signed.
fn certificates(dir: &Path, name: &str) -> bool {
    let write = |file: &str, text: &str| fs::write(dir.join(file), text).unwrap();
    write(
        "ca.tmpl",
        "cn = authority\nca\ncert_signing_key\nexpiration_days = 10\n",
    );
    write(
        "end.tmpl",
        "cn = end\ndns_name = localhost\ntls_www_server\ntls_www_client\nsigning_key\nencryption_key\nexpiration_days = 10\n",
    );
    let (key, cert) = (format!("{name}-key.pem"), format!("{name}-cert.pem"));
    let new_key = |out: &str| {
        certtool(
            dir,
            &[
                "--generate-privkey",
                "--key-type=rsa",
                "--no-text",
                "--outfile",
                out,
            ],
        )
    };
    new_key("ca-key.pem")
        && new_key(&key)
        && certtool(
            dir,
            &[
                "--generate-self-signed",
                "--no-text",
                "--load-privkey=ca-key.pem",
                "--template=ca.tmpl",
                "--outfile=ca-cert.pem",
            ],
        )
        && certtool(
            dir,
            &[
                "--generate-certificate",
                "--no-text",
                "--load-ca-certificate=ca-cert.pem",
                "--load-ca-privkey=ca-key.pem",
                "--template=end.tmpl",
                "--load-privkey",
                &key,
                "--outfile",
                &cert,
            ],
        )
}

fn open(socket: &Path, creds: &Path, verify_peer: bool, hostname: Option<&str>) -> Result<Nbd> {
    let mut objects = Objects::new();
    let creds = TlsCreds {
        kind: TlsKind::X509 { password_id: None },
        dir: creds.to_str().map(str::to_owned),
        is_server: false,
        verify_peer,
        helper: None,
        priority: None,
    };
    objects.add("t", Object::TlsCreds(creds)).unwrap();
    let mut options = NodeOptions::new();
    options.set("path", socket.to_str().unwrap());
    options.set("tls-creds", "t");
    if let Some(hostname) = hostname {
        options.set("tls-hostname", hostname);
    }
    Nbd::open(&mut options, true, &objects)
}

/// Reports that a test was skipped, because a tool is not installed.
fn skip(tool: &str) {
    let required = std::env::var_os("REQUIRE_STOCK_TOOLS").is_some_and(|value| value == "1");
    assert!(
        !required,
        "{tool} is required (REQUIRE_STOCK_TOOLS=1) and does not work"
    );
    // Written directly, so that the test harness does not capture it.
    let _ = writeln!(std::io::stderr(), "skipped: {tool} is not installed");
}

#[test]
fn encrypted_connections_authenticate_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    fs::create_dir(&ours).unwrap();
    fs::create_dir(&theirs).unwrap();
    if !certificates(&ours, "server") || !certificates(&theirs, "client") {
        return skip("certtool");
    }
    for kind in ["key", "cert"] {
        fs::copy(
            ours.join(format!("server-{kind}.pem")),
            ours.join(format!("client-{kind}.pem")),
        )
        .unwrap();
    }
    let image = dir.path().join("image");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let socket = dir.path().join("s");
    let server = Command::new("qemu-nbd")
        .arg(format!(
            "--object=tls-creds-x509,id=s,endpoint=server,dir={},verify-peer=on",
            ours.display()
        ))
        .args([
            "--tls-creds=s",
            "--persistent",
            "--shared=9",
            "--format=raw",
            "--socket",
        ])
        .args([&socket, &image])
        .stderr(Stdio::null())
        .spawn();
    let Ok(server) = server.map(Running) else {
        return skip("qemu-nbd");
    };
    for _ in 0..400 {
        if socket.exists() {
            break;
        }
        thread::sleep(Duration::from_millis(25));
    }
    let device = open(&socket, &ours, true, Some("localhost")).unwrap();
    let bytes: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    thread::scope(|scope| {
        for n in 0..3 {
            let (device, bytes) = (&device, &bytes);
            scope.spawn(move || device.write_at(bytes, n * 300_000).unwrap());
        }
    });
    let mut back = vec![0; bytes.len()];
    device.read_at(&mut back, 300_000).unwrap();
    assert!(back == bytes);
    drop(device);
    let refused = |outcome: Result<Nbd>| outcome.map(|_| ()).unwrap_err().chain();
    assert_eq!(
        refused(open(&socket, &ours, true, Some("elsewhere"))),
        "Certificate does not match the hostname elsewhere"
    );
    assert_eq!(
        refused(open(&socket, &ours, true, None)),
        "No hostname for certificate validation"
    );
    assert_eq!(
        refused(open(&socket, &theirs, true, Some("localhost"))),
        "The certificate hasn't got a known issuer"
    );
    // The server does not know the issuer of the client certificate.
    assert_eq!(
        refused(open(&socket, &theirs, false, None)),
        "Failed to read option reply: Cannot read from TLS channel: The TLS connection was non-properly terminated."
    );
    drop(server);
}
