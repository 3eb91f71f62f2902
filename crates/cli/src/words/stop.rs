//! The reasons why a command is not run, or ends early.

use diskimage::Note;

/// The reason why a command is not run, or ends early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `--help`: print the help text of the command.
    Help,
    /// Print a text that was requested, such as the list of object types.
    Text(String),
    /// Print an error.
    Wrong(Wrong),
}

/// An error as it is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The messages; each is one line, printed after the prefix.
    pub messages: Vec<String>,
    /// Lines of advice after them, without a prefix.
    pub hints: Vec<String>,
    /// The note that is printed before the messages.
    pub notice: Option<Note>,
    /// The prefix of each message.
    pub prefix: Prefix,
    /// Whether a line follows that refers to `--help`.
    pub try_help: bool,
    /// The exit status.
    pub status: u8,
}

/// The prefix of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// The program's name without its directory.
    Program,
    /// The program as it was called and the command, as in the messages of `getopt_long`.
    Invocation,
}

impl Stop {
    /// An error with one message; exit status 1.
    pub fn wrong(message: impl Into<String>) -> Self {
        Self::Wrong(Wrong {
            messages: vec![message.into()],
            hints: Vec::new(),
            notice: None,
            prefix: Prefix::Program,
            try_help: false,
            status: 1,
        })
    }

    /// An error with a line that refers to `--help`; exit status 1.
    pub fn misused(message: impl Into<String>) -> Self {
        Self::wrong(message).pointing_to_help()
    }

    /// An unknown option, or an option without its value.
    pub fn unreadable(message: impl Into<String>) -> Self {
        let mut stop = Self::misused(message);
        if let Self::Wrong(wrong) = &mut stop {
            wrong.prefix = Prefix::Invocation;
        }
        stop
    }

    /// Adds a message.
    #[must_use]
    pub fn and(mut self, message: impl Into<String>) -> Self {
        if let Self::Wrong(wrong) = &mut self {
            wrong.messages.push(message.into());
        }
        self
    }

    /// Adds lines of advice.
    #[must_use]
    pub fn with_hints<S: Into<String>>(mut self, lines: impl IntoIterator<Item = S>) -> Self {
        if let Self::Wrong(wrong) = &mut self {
            wrong.hints.extend(lines.into_iter().map(Into::into));
        }
        self
    }

    /// Sets the exit status.
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
        Self::wrong(error.message()).with_hints(error.hints().iter().copied())
    }
}

impl From<diskimage::Error> for Stop {
    /// An error of the library: its messages joined by `": "`, then its hints on lines of their own.
    fn from(error: diskimage::Error) -> Self {
        let mut stop = Self::wrong(error.chain()).with_hints(error.hint_lines().to_vec());
        if let Self::Wrong(wrong) = &mut stop {
            wrong.notice = error.preceding_note().cloned();
        }
        stop
    }
}
