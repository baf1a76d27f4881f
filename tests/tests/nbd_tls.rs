//! NBD in TLS: who gets in, who does not, and that nothing said in the clear counts.

use std::path::PathBuf;

use upcall_tests::nbd::{RawNbd, fail, nbdsh, succeed};
use upcall_tests::{Scratch, Server, upcall};

/// Certificates made with GnuTLS's tool: an authority, a server, clients; and an authority
/// that nobody trusts.
struct Certificates {
    scratch: Scratch,
}

impl Certificates {
    fn new() -> Certificates {
        let made = Certificates { scratch: Scratch::new() };
        made.authority("ca");
        made.authority("other");
        let server = "cn = server\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\n";
        made.signed("server", "ca", server);
        for (folder, authority, dates) in [
            ("good", "ca", ""),
            ("stranger", "other", ""),
            (
                "expired",
                "ca",
                "activation_date = \"2020-01-01\"\nexpiration_date = \"2020-02-01\"\n",
            ),
        ] {
            let name = format!("client-{folder}");
            made.signed(&name, authority, &format!("cn = client\ntls_www_client\n{dates}"));
            let to = made.folder(folder);
            std::fs::copy(made.path("ca-cert.pem"), to.join("ca-cert.pem")).unwrap();
            for kind in ["cert", "key"] {
                let from = made.path(&format!("{name}-{kind}.pem"));
                std::fs::copy(from, to.join(format!("client-{kind}.pem"))).unwrap();
            }
        }
        let nobody = made.folder("nobody");
        std::fs::copy(made.path("ca-cert.pem"), nobody.join("ca-cert.pem")).unwrap();
        let wary = made.folder("wary");
        std::fs::copy(made.path("other-cert.pem"), wary.join("ca-cert.pem")).unwrap();
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// What a client has, by the name of its folder.
    fn folder(&self, name: &str) -> PathBuf {
        let folder = self.path(name);
        let _ = std::fs::create_dir(&folder);
        folder
    }

    fn key(&self, name: &str) -> String {
        let key = self.scratch.text(&format!("{name}-key.pem"));
        succeed("certtool", &["--generate-privkey", "--key-type=ed25519", "--outfile", &key]);
        key
    }

    fn template(&self, name: &str, text: &str) -> String {
        let template = self.scratch.text(&format!("{name}.template"));
        std::fs::write(&template, text).unwrap();
        template
    }

    fn authority(&self, name: &str) {
        let key = self.key(name);
        let template = self.template(name, &format!("cn = {name}\nca\ncert_signing_key\n"));
        let certificate = self.scratch.text(&format!("{name}-cert.pem"));
        let args = ["--generate-self-signed", "--load-privkey", &key, "--template", &template];
        succeed("certtool", &[&args[..], &["--outfile", &certificate]].concat());
    }

    fn signed(&self, name: &str, authority: &str, text: &str) {
        let key = self.key(name);
        let template = self.template(name, &format!("{text}signing_key\n"));
        let certificate = self.scratch.text(&format!("{name}-cert.pem"));
        let file = |kind: &str| self.scratch.text(&format!("{authority}-{kind}.pem"));
        let (ca, ca_key) = (file("cert"), file("key"));
        let mut args = vec!["--generate-certificate", "--load-privkey", &key];
        args.extend(["--load-ca-certificate", &ca, "--load-ca-privkey", &ca_key]);
        args.extend(["--template", &template, "--outfile", &certificate]);
        succeed("certtool", &args);
    }

    fn words(&self) -> String {
        let (cert, key) =
            (self.scratch.text("server-cert.pem"), self.scratch.text("server-key.pem"));
        format!("name=root,memory=8M,nbd=localhost:0,nbd-tls-cert={cert},nbd-tls-key={key}")
    }

    /// The URI for a client that has what is in a folder.
    fn uri(&self, server: &Server, folder: &str) -> String {
        let line = server.stdout().lines().find_map(|line| line.trim().strip_prefix("nbd: "));
        let uri = line.unwrap().replace("127.0.0.1", "localhost").replace("[::1]", "localhost");
        assert!(uri.starts_with("nbds://localhost:"), "{uri}");
        format!("{uri}?tls-certificates={}", self.path(folder).display())
    }

    /// HOST:PORT of the server.
    fn address(&self, server: &Server) -> String {
        let uri = self.uri(server, "good");
        uri["nbds://".len()..].split('/').next().unwrap().to_owned()
    }
}

#[test]
fn with_an_authority_only_clients_it_has_signed_get_in() {
    let certificates = Certificates::new();
    let words =
        format!("{},nbd-tls-ca={}", certificates.words(), certificates.scratch.text("ca-cert.pem"));
    let server = Server::serve(&certificates.scratch, &[&words], &[]);
    for folder in ["nobody", "stranger", "expired", "wary"] {
        fail("nbdinfo", &["--size", &certificates.uri(&server, folder)]);
    }
    let uri = certificates.uri(&server, "good");
    assert_eq!(succeed("nbdinfo", &["--size", &uri]), "8388608\n");
    nbdsh(
        &uri,
        "
h.set_uri_allow_local_file(True)
h.add_meta_context('base:allocation')
h.connect_uri(uri)
assert h.get_tls_negotiated()
assert h.can_meta_context('base:allocation')
data = bytearray(i % 249 for i in range(4 << 20))
h.pwrite(data, 4096)
assert h.pread(4 << 20, 4096) == data
h.flush()
h.shutdown()
",
    );
    let copy = certificates.scratch.text("copy.img");
    succeed("nbdcopy", &["--connections=4", &uri, &copy]);
    let bytes = std::fs::read(&copy).unwrap();
    assert!(bytes[4096..4096 + (4 << 20)].iter().enumerate().all(|(i, b)| *b == (i % 249) as u8));
    assert!(server.stderr().contains("NBD: "), "who was turned away is said");
    server.stop();
}

#[test]
fn without_an_authority_every_client_gets_in_that_trusts_the_server() {
    let certificates = Certificates::new();
    let server = Server::serve(&certificates.scratch, &[&certificates.words()], &[]);
    for folder in ["nobody", "stranger"] {
        let uri = certificates.uri(&server, folder);
        assert_eq!(succeed("nbdinfo", &["--size", &uri]), "8388608\n", "{folder}");
    }
    fail("nbdinfo", &["--size", &certificates.uri(&server, "wary")]);
    server.stop();
}

#[test]
fn in_the_clear_nobody_gets_in_where_tls_is_required_and_anybody_where_it_is_optional() {
    let certificates = Certificates::new();
    let server = Server::serve(&certificates.scratch, &[&certificates.words()], &[]);
    let plain = format!("nbd://{}/root", certificates.address(&server));
    fail("nbdinfo", &["--size", &plain]);
    fail("nbdinfo", &["--list", &plain]);
    server.stop();
    let words = certificates.words() + ",nbd-tls=optional";
    let server = Server::serve(&certificates.scratch, &[&words], &[]);
    let plain = format!("nbd://{}/root", certificates.address(&server));
    assert_eq!(succeed("nbdinfo", &["--size", &plain]), "8388608\n");
    let secure = certificates.uri(&server, "good");
    assert_eq!(succeed("nbdinfo", &["--size", &secure]), "8388608\n");
    server.stop();
}

#[test]
fn what_is_said_in_the_clear_after_asking_for_tls_ends_the_connection() {
    let certificates = Certificates::new();
    let words = certificates.words() + ",nbd-tls=optional";
    let server = Server::serve(&certificates.scratch, &[&words], &[]);
    let mut client = RawNbd::tcp(&certificates.address(&server));
    client.begin();
    // STARTTLS, and in the same breath LIST: as if it had been said in TLS.
    let mut bytes = b"IHAVEOPT\0\0\0\x05\0\0\0\0".to_vec();
    bytes.extend(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
    client.write(&bytes);
    assert_eq!(client.read_to_end(), b"", "neither is answered");
    // Plain options where TLS should begin are no TLS.
    let mut client = RawNbd::tcp(&certificates.address(&server));
    client.begin();
    client.option(5, &[]);
    assert_eq!(client.reply().0, 1);
    client.option(3, &[]);
    let said = client.read_to_end();
    assert!(said.len() < 20, "at most an alert: {said:?}");
    let secure = certificates.uri(&server, "good");
    assert_eq!(succeed("nbdinfo", &["--size", &secure]), "8388608\n", "others are served");
    server.stop();
}

#[test]
fn certificates_that_cannot_be_used_are_named() {
    let certificates = Certificates::new();
    let file = |name: &str| certificates.scratch.text(name);
    std::fs::write(certificates.path("empty.pem"), "nothing\n").unwrap();
    for (cert, key, ca, says) in [
        ("none.pem", "server-key.pem", "ca-cert.pem", "none.pem"),
        ("empty.pem", "server-key.pem", "ca-cert.pem", "empty.pem"),
        ("server-cert.pem", "empty.pem", "ca-cert.pem", "empty.pem"),
        ("server-cert.pem", "other-key.pem", "ca-cert.pem", "server-cert.pem"),
        ("server-cert.pem", "server-key.pem", "empty.pem", "empty.pem"),
    ] {
        let words = format!(
            "name=root,memory=1M,nbd=localhost:0,nbd-tls-cert={},nbd-tls-key={},nbd-tls-ca={}",
            file(cert),
            file(key),
            file(ca)
        );
        let ended = upcall(&["serve", "--disk", &words]);
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.stderr.contains(says) && ended.stderr.contains("disk root"), "{ended:#?}");
    }
}
