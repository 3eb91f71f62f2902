//! What the nodes of one block graph share while they are opened.

use std::fmt;
use std::sync::Arc;

use crate::{
    Budget, ClosedGate, Device, Error, Gate, LocalTime, NodeOptions, Note, Objects, Origin, Permissions,
    Reference, Result, Role,
};

/// Takes a message for the user, which may have several lines.
pub type OnNote = dyn Fn(&Note) + Send + Sync;

/// Takes the name of an image whose changes were lost when it was dropped, and the error.
pub type OnImageLost = dyn Fn(&str, &Error) + Send + Sync;

/// What the nodes of one block graph share while they are opened. It is made once, from the user's options; drivers
/// receive it with each request to open a node. The default opens no other files and has no objects.
#[derive(Clone)]
pub struct OpenContext {
    /// The objects (secrets and the like) that options refer to by name.
    pub objects: Arc<Objects>,
    /// Opens the files that images refer to.
    pub gate: Arc<dyn Gate>,
    /// The memory that numbers in images may claim.
    pub budget: Budget,
    /// The local time of the user.
    pub local_time: LocalTime,
    /// Called with each message for the user.
    pub on_note: Option<Arc<OnNote>>,
    /// Called if the changes of an image cannot be written back when it is dropped.
    pub on_lost: Option<Arc<OnImageLost>>,
    /// Files of a new image, which are opened from here.
    pub new_files: OpenFiles,
}

/// Files that are open already: those of a new image that is not complete. A driver that is to open one for writing takes
/// it from here, since nothing may have this name yet, or something else by now.
#[derive(Clone, Debug, Default)]
pub struct OpenFiles {
    files: Arc<[(String, Arc<dyn Device>)]>,
    storage: Option<Arc<Storage>>,
}

/// Storage that is not found by a path.
#[derive(Debug)]
struct Storage {
    protocol: &'static str,
    node: NodeOptions,
    device: Arc<dyn Device>,
}

impl OpenFiles {
    /// The files, each with its path.
    pub fn new(files: Vec<(String, Arc<dyn Device>)>) -> Self {
        Self {
            files: files.into(),
            storage: None,
        }
    }

    /// The same, and storage that was opened by the protocol of this name with `node`.
    #[must_use]
    pub fn with_storage(self, protocol: &'static str, node: NodeOptions, device: Arc<dyn Device>) -> Self {
        let storage = Storage {
            protocol,
            node,
            device,
        };
        Self {
            storage: Some(Arc::new(storage)),
            ..self
        }
    }

    /// The files, each with its path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Arc<dyn Device>)> {
        self.files.iter().map(|(path, device)| (path.as_str(), device))
    }

    /// The storage that `protocol` would open with `node`.
    pub fn storage(&self, protocol: &str, node: &NodeOptions) -> Option<&Arc<dyn Device>> {
        let storage = self.storage.as_ref()?;
        let is_it = storage.protocol == protocol && storage.node == *node;
        is_it.then_some(&storage.device)
    }
}

impl OpenContext {
    /// Opens other files through `gate`, and has defaults for the rest.
    pub fn new(gate: Arc<dyn Gate>) -> Self {
        Self {
            objects: Arc::default(),
            gate,
            budget: Budget::default(),
            local_time: LocalTime::default(),
            on_note: None,
            on_lost: None,
            new_files: OpenFiles::default(),
        }
    }

    /// The same with these objects.
    #[must_use]
    pub fn with_objects(self, objects: Arc<Objects>) -> Self {
        Self { objects, ..self }
    }

    /// Passes a message on to the user.
    pub fn tell(&self, note: &Note) {
        if let Some(on_note) = &self.on_note {
            on_note(note);
        }
    }

    /// Opens the file `name`, in which the image `from` of this origin keeps guest data. A relative name is resolved
    /// against the current directory.
    ///
    /// # Errors
    /// As [`Gate::open`].
    pub fn open_data(
        &self,
        name: &str,
        from: &str,
        origin: Origin,
        permissions: Permissions,
    ) -> Result<Arc<dyn Device>> {
        let mut options = NodeOptions::new();
        options.set("filename", name);
        self.gate.open(&Reference {
            options: &options,
            from,
            origin,
            role: Role::Data,
            permissions,
            context: self,
        })
    }
}

impl Default for OpenContext {
    fn default() -> Self {
        Self::new(Arc::new(ClosedGate))
    }
}

impl fmt::Debug for OpenContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenContext")
            .field("objects", &self.objects)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}
