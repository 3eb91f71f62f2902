//! What options refer to by name: secrets and credentials.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::{Error, ErrorKind, Result, ThrottleGroup};

/// The objects that a user defined, by identifier.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    objects: BTreeMap<String, Object>,
}

/// An object.
#[derive(Clone, Debug)]
pub enum Object {
    /// A password or key.
    Secret(Secret),
    /// Who we are, and whom we believe, on encrypted connections.
    TlsCreds(TlsCreds),
    /// Limits that nodes share.
    ThrottleGroup(Arc<ThrottleGroup>),
}

/// A password or key. Its bytes are wiped from memory when the last copy goes.
#[derive(Clone)]
pub struct Secret {
    bytes: zeroize::Zeroizing<Vec<u8>>,
}

impl Secret {
    /// A secret of these bytes.
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
    /// Which kind.
    pub kind: TlsKind,
    /// The directory with the files of credentials, if given.
    pub dir: Option<String>,
    /// Whether for a server and not for a client.
    pub is_server: bool,
    /// Whether the peer's certificate is checked.
    pub verify_peer: bool,
    /// Which ciphers are allowed, in the words of the TLS library.
    pub priority: Option<String>,
}

/// Kinds of [`TlsCreds`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsKind {
    /// Certificates.
    X509 {
        /// The secret with the password of the private key.
        password_id: Option<String>,
    },
    /// A key that both sides have.
    Psk {
        /// Which of the keys in the file.
        username: Option<String>,
    },
    /// None: encrypted, but with anybody.
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
    /// An identifier that is taken.
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

    /// The object of this identifier.
    pub fn find(&self, id: &str) -> Option<&Object> {
        self.objects.get(id)
    }

    /// The secret of this identifier.
    ///
    /// # Errors
    /// None of this identifier, or an object of another kind.
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

    /// The group of this identifier.
    ///
    /// # Errors
    /// None of this identifier.
    pub fn throttle_group(&self, id: &str) -> Result<&Arc<ThrottleGroup>> {
        match self.find(id) {
            Some(Object::ThrottleGroup(group)) => Ok(group),
            _ => Err(Error::new(
                ErrorKind::NotFound,
                format!("Throttle group '{id}' does not exist"),
            )),
        }
    }

    /// The credentials of this identifier.
    ///
    /// # Errors
    /// None of this identifier, or an object of another kind.
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
