//! Why words did not become arguments.

use diskimage::Note;

/// What ends the reading of words early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `--help`: the text for the command at hand.
    Help,
    /// Text that was asked for, such as the list of object types.
    Text(String),
    /// Something is wrong.
    Wrong(Wrong),
}

/// What is wrong with words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Messages, each printed after the prefix. Further lines of a message are printed without it.
    pub messages: Vec<String>,
    /// What is printed before the messages.
    pub notice: Option<Note>,
    /// What stands in front of each message.
    pub prefix: Prefix,
    /// Whether a line follows that points to `--help`.
    pub try_help: bool,
    /// The exit status.
    pub status: u8,
}

/// What stands in front of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// The program's name without its directory.
    Program,
    /// The program as it was called and the command, as C's `getopt_long` has it.
    Words,
}

impl Stop {
    /// A message alone; exit status 1.
    pub fn wrong(message: impl Into<String>) -> Self {
        Self::Wrong(Wrong {
            messages: vec![message.into()],
            notice: None,
            prefix: Prefix::Program,
            try_help: false,
            status: 1,
        })
    }

    /// A message with a line that points to `--help`; exit status 1.
    pub fn misused(message: impl Into<String>) -> Self {
        Self::wrong(message).pointing_to_help()
    }

    /// A word that is no option, or an option without its value.
    pub fn unreadable(message: impl Into<String>) -> Self {
        let mut stop = Self::misused(message);
        if let Self::Wrong(wrong) = &mut stop {
            wrong.prefix = Prefix::Words;
        }
        stop
    }

    /// One more message after those there are.
    #[must_use]
    pub fn and(mut self, message: impl Into<String>) -> Self {
        if let Self::Wrong(wrong) = &mut self {
            wrong.messages.push(message.into());
        }
        self
    }

    /// The same with another exit status.
    #[must_use]
    pub fn with_status(mut self, status: u8) -> Self {
        if let Self::Wrong(wrong) = &mut self {
            wrong.status = status;
        }
        self
    }

    fn pointing_to_help(mut self) -> Self {
        if let Self::Wrong(wrong) = &mut self {
            wrong.try_help = true;
        }
        self
    }
}

impl From<diskimage::options::OptionError> for Stop {
    fn from(error: diskimage::options::OptionError) -> Self {
        match error.hint() {
            Some(hint) => Self::wrong(format!("{}\n{hint}", error.message())),
            None => Self::wrong(error.message()),
        }
    }
}

impl From<diskimage::Error> for Stop {
    /// An error of the library: its levels joined by `": "`, then its hint on a line of its own.
    fn from(error: diskimage::Error) -> Self {
        let mut stop = match error.hint_line() {
            Some(hint) => Self::wrong(format!("{}\n{hint}", error.chain())),
            None => Self::wrong(error.chain()),
        };
        if let Self::Wrong(wrong) = &mut stop {
            wrong.notice = error.preceding_note().cloned();
        }
        stop
    }
}
