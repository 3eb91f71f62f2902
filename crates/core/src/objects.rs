//! Objects that options refer to by identifier: secrets, credentials, throttle groups.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{Error, ErrorKind, Result, ThrottleGroup};

/// The objects that the user defined, by identifier.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    objects: BTreeMap<String, Object>,
}

/// An object.
#[derive(Clone, Debug)]
pub enum Object {
    /// A password or key.
    Secret(Secret),
    /// The own identity and the trusted peers on encrypted connections.
    TlsCreds(TlsCreds),
    /// Throttle limits that nodes share.
    ThrottleGroup(Arc<ThrottleGroup>),
}

/// A password or key. Its bytes are wiped from memory on drop.
#[derive(Clone)]
pub struct Secret {
    bytes: zeroize::Zeroizing<Vec<u8>>,
}

impl Secret {
    /// A secret with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: zeroize::Zeroizing::new(bytes),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Credentials for encrypted connections.
#[derive(Clone, Debug)]
pub struct TlsCreds {
    /// The kind of credentials.
    pub kind: TlsKind,
    /// The directory with the credentials files, if given.
    pub dir: Option<String>,
    /// Whether the credentials are for a server; else they are for a client.
    pub is_server: bool,
    /// Whether the peer's certificate is checked.
    pub verify_peer: bool,
    /// The path of the program `qemu-img-tls`, if there is one. Credentials without certificates need it.
    pub helper: Option<PathBuf>,
    /// The allowed ciphers, in the syntax of the TLS library (GnuTLS priority string).
    pub priority: Option<String>,
}

/// Kinds of [`TlsCreds`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsKind {
    /// X.509 certificates.
    X509 {
        /// The secret with the password of the private key.
        password_id: Option<String>,
    },
    /// A pre-shared key.
    Psk {
        /// The name of the key in the file.
        username: Option<String>,
    },
    /// Anonymous: encrypted, but the peer is not authenticated.
    Anon,
}

impl Objects {
    /// No objects.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an object.
    ///
    /// # Errors
    /// An identifier that is in use.
    pub fn add(&mut self, id: impl Into<String>, object: Object) -> Result<()> {
        let id = id.into();
        if self.objects.contains_key(&id) {
            return Err(Error::invalid(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        self.objects.insert(id, object);
        Ok(())
    }

    /// The objects, in the order of their identifiers.
    pub fn iter(&self) -> impl Iterator<Item = &Object> {
        self.objects.values()
    }

    /// The object with this identifier.
    pub fn find(&self, id: &str) -> Option<&Object> {
        self.objects.get(id)
    }

    /// The secret with this identifier.
    ///
    /// # Errors
    /// No object with this identifier, or one of another kind.
    pub fn secret(&self, id: &str) -> Result<&Secret> {
        match self.find(id) {
            Some(Object::Secret(secret)) => Ok(secret),
            Some(_) => Err(Error::invalid(format!("Object with id '{id}' is not a secret"))),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("No secret with id '{id}'"),
            )),
        }
    }

    /// The throttle group with this identifier.
    ///
    /// # Errors
    /// No throttle group with this identifier.
    pub fn throttle_group(&self, id: &str) -> Result<&Arc<ThrottleGroup>> {
        match self.find(id) {
            Some(Object::ThrottleGroup(group)) => Ok(group),
            _ => Err(Error::new(
                ErrorKind::NotFound,
                format!("Throttle group '{id}' does not exist"),
            )),
        }
    }

    /// The credentials with this identifier.
    ///
    /// # Errors
    /// No object with this identifier, or one of another kind.
    pub fn tls_creds(&self, id: &str) -> Result<&TlsCreds> {
        match self.find(id) {
            Some(Object::TlsCreds(creds)) => Ok(creds),
            Some(_) => Err(Error::invalid(format!(
                "Object with id '{id}' is not TLS credentials"
            ))),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("No TLS credentials with id '{id}'"),
            )),
        }
    }
}
