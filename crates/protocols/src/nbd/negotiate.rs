//! The negotiation of an export with a server, without I/O.
//!
//! [`Handshake::wanted`] is the number of bytes needed next, [`Handshake::take`] takes exactly those, and
//! [`Handshake::output`] returns the bytes to send. So the negotiation never reads bytes that belong to TLS or to the
//! first reply.
//!
//! ```text
//!   hello -> flags -> [STARTTLS ~ encryption] -> EXTENDED_HEADERS -> [STRUCTURED_REPLY] -> [SET_META_CONTEXT] -> GO
//!      |        |                                                                                        no GO |
//!      |        +-- a server without fixed newstyle -----------------------------------------------> EXPORT_NAME
//!      +-- an oldstyle server: a single export, no negotiation
//! ```

use diskimage_core::{Error, ErrorKind, Result, name, saturating_u32};

use super::wire::{
    INIT_MAGIC, OLDSTYLE_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, Wire, export, handshake, info, option,
    option_reply,
};

/// The parameters of the client.
#[derive(Clone, Debug)]
pub(super) struct ClientOptions {
    /// The export's name; empty for the default one.
    pub(super) export: String,
    /// Whether the connection must be encrypted.
    pub(super) tls: bool,
    /// The metadata context to request block status of.
    pub(super) context: String,
}

/// The form of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplyMode {
    /// Replies are an error number and the data of a read.
    Simple,
    /// Replies are made of chunks.
    Structured,
    /// Replies are made of chunks, and all lengths have 64 bits.
    Extended,
}

/// The properties of an export, as the server announced them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Export {
    /// Its length in bytes.
    pub(super) len: u64,
    /// The transmission flags: [`export`].
    pub(super) flags: u16,
    /// Offsets and lengths of requests are multiples of this power of two.
    pub(super) min_block: u32,
    /// The longest request, in bytes.
    pub(super) max_block: u32,
    /// The form of replies.
    pub(super) reply_mode: ReplyMode,
    /// The server's number for the requested metadata context.
    pub(super) context: Option<u32>,
}

/// What to do after [`Handshake::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Send the output and read on.
    Read,
    /// Start TLS, then call [`Handshake::secured`].
    StartTls,
    /// The negotiation is complete.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Hello,
    Oldstyle,
    Flags,
    /// The head of a reply to this option.
    Reply(u32),
    /// The payload of a reply: the option and the type of the reply.
    Body(u32, u32),
    ExportName,
    Done,
}

/// The longest accepted reply to an option; the protocol limits its strings to 4096 bytes.
const MAX_REPLY: u32 = 1 << 16;
/// The limit of replies to options for one connection.
const MAX_REPLIES: u32 = 1024;
/// The longest request with data if the server announces no limit, and the upper limit of what it may announce.
pub(super) const MAX_REQUEST: u32 = 32 << 20;
/// The largest accepted minimum block size.
const MAX_MIN_BLOCK: u32 = MAX_REQUEST;
/// The smallest accepted maximum block size.
const SECTOR: u32 = 512;
/// The longest name of an export or context.
pub(super) const MAX_NAME: usize = 4096;

/// The state of a negotiation.
#[derive(Debug)]
pub(super) struct Handshake {
    client_options: ClientOptions,
    state: State,
    wanted: usize,
    output: Vec<u8>,
    replies: u32,
    no_zeroes: bool,
    encrypted: bool,
    /// The server has sent length and flags of the export.
    has_export: bool,
    export: Export,
}

impl Handshake {
    pub(super) fn new(client_options: ClientOptions) -> Self {
        Self {
            client_options,
            state: State::Hello,
            wanted: 16,
            output: Vec::new(),
            replies: 0,
            no_zeroes: false,
            encrypted: false,
            has_export: false,
            export: Export {
                len: 0,
                flags: 0,
                min_block: 1,
                max_block: MAX_REQUEST,
                reply_mode: ReplyMode::Simple,
                context: None,
            },
        }
    }

    /// The number of bytes that [`Handshake::take`] needs next.
    pub(super) fn wanted(&self) -> usize {
        self.wanted
    }

    /// The bytes to send before reading on.
    pub(super) fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The bytes to send before the connection is closed after an error: `NBD_OPT_ABORT` while options are negotiated.
    pub(super) fn abort(&mut self) -> Vec<u8> {
        self.output.clear();
        if matches!(self.state, State::Reply(_) | State::Body(..)) {
            self.put_option(option::ABORT, &[]);
        }
        self.output()
    }

    /// The negotiated export, after [`Next::Done`].
    pub(super) fn finish(self) -> Export {
        self.export
    }

    /// Whether the connection is encrypted already.
    pub(super) fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// The message for a failure to read the bytes that are needed next.
    pub(super) fn awaited(&self) -> &'static str {
        match self.state {
            State::Hello => "Failed to read initial magic",
            State::Flags => "Failed to read server flags",
            State::Oldstyle | State::ExportName => "Failed to read export length",
            State::Reply(_) | State::Body(..) | State::Done => "Failed to read option reply",
        }
    }

    /// Takes the next [`Handshake::wanted`] bytes.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Next> {
        let wire = Wire(bytes);
        match self.state {
            State::Hello => self.hello(wire),
            State::Oldstyle => self.oldstyle(wire),
            State::Flags => self.flags(wire),
            State::Reply(option) => self.reply(option, wire),
            State::Body(option, kind) => self.body(option, kind, wire),
            State::ExportName => self.export_name(wire),
            State::Done => Ok(Next::Done),
        }
    }

    /// Continues after the connection has been encrypted.
    pub(super) fn secured(&mut self) {
        self.encrypted = true;
        self.ask(option::EXTENDED_HEADERS, &[]);
    }

    fn want(&mut self, state: State, wanted: usize) -> Next {
        (self.state, self.wanted) = (state, wanted);
        if wanted == 0 { Next::Done } else { Next::Read }
    }

    fn hello(&mut self, mut wire: Wire<'_>) -> Result<Next> {
        let magic = wire.u64()?;
        if magic != INIT_MAGIC {
            return Err(Error::corrupt(format!(
                "Bad initial magic received: {magic:#018x}"
            )));
        }
        match wire.u64()? {
            OPTION_MAGIC => Ok(self.want(State::Flags, 2)),
            OLDSTYLE_MAGIC if self.client_options.tls => Err(no_starttls()),
            OLDSTYLE_MAGIC if !self.client_options.export.is_empty() => Err(Error::unsupported(
                "Server does not support non-empty export names",
            )),
            OLDSTYLE_MAGIC => Ok(self.want(State::Oldstyle, 8 + 4 + 124)),
            other => Err(Error::corrupt(format!(
                "Bad server magic received: {other:#018x}"
            ))),
        }
    }

    fn oldstyle(&mut self, mut wire: Wire<'_>) -> Result<Next> {
        let len = wire.u64()?;
        // 32 bits of flags, of which the upper half is reserved.
        let (_, flags) = (wire.u16()?, wire.u16()?);
        self.set_export(len, flags)?;
        Ok(self.want(State::Done, 0))
    }

    fn flags(&mut self, mut wire: Wire<'_>) -> Result<Next> {
        let flags = wire.u16()?;
        let fixed = flags & handshake::FIXED_NEWSTYLE;
        let no_zeroes = flags & handshake::NO_ZEROES;
        self.no_zeroes = no_zeroes != 0;
        self.output
            .extend_from_slice(&u32::from(fixed | no_zeroes).to_be_bytes());
        if fixed == 0 {
            if self.client_options.tls {
                return Err(no_starttls());
            }
            return Ok(self.name_export());
        }
        let first = if self.client_options.tls {
            option::STARTTLS
        } else {
            option::EXTENDED_HEADERS
        };
        Ok(self.ask(first, &[]))
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> Next {
        self.put_option(option, data);
        self.want(State::Reply(option), 20)
    }

    fn put_option(&mut self, option: u32, data: &[u8]) {
        // Names are limited to `MAX_NAME` bytes.
        let len = saturating_u32(data.len());
        self.output.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&len.to_be_bytes());
        self.output.extend_from_slice(data);
    }

    /// Selects the export with `NBD_OPT_EXPORT_NAME`, whose only reply is the export.
    fn name_export(&mut self) -> Next {
        let export = name::to_bytes(&self.client_options.export).into_owned();
        self.put_option(option::EXPORT_NAME, &export);
        let zeroes = if self.no_zeroes { 0 } else { 124 };
        self.want(State::ExportName, 8 + 2 + zeroes)
    }

    fn export_name(&mut self, mut wire: Wire<'_>) -> Result<Next> {
        let (len, flags) = (wire.u64()?, wire.u16()?);
        self.set_export(len, flags)?;
        Ok(self.want(State::Done, 0))
    }

    fn set_export(&mut self, len: u64, flags: u16) -> Result<()> {
        if i64::try_from(len).is_err() {
            return Err(Error::corrupt(format!("export length {len:#x} is too large")));
        }
        // Without HAS_FLAGS the other flags are invalid.
        let flags = if flags & export::HAS_FLAGS == 0 { 0 } else { flags };
        (self.export.len, self.export.flags) = (len, flags);
        self.has_export = true;
        Ok(())
    }

    fn reply(&mut self, option: u32, mut wire: Wire<'_>) -> Result<Next> {
        if wire.u64()? != OPTION_REPLY_MAGIC {
            return Err(Error::corrupt("Unexpected option reply magic"));
        }
        let (about, kind, len) = (wire.u32()?, wire.u32()?, wire.u32()?);
        if about != option {
            return Err(Error::corrupt(format!(
                "Unexpected option type {about} ({}), expected {option} ({})",
                option_name(about),
                option_name(option),
            )));
        }
        self.replies += 1;
        if self.replies > MAX_REPLIES {
            return Err(Error::corrupt(
                "The server does not come to an end with its options",
            ));
        }
        if kind == option_reply::ACK && len != 0 {
            return Err(Error::corrupt(format!(
                "Option {option} ('{}') response length is {len} (it should be zero)",
                option_name(option)
            )));
        }
        if len > MAX_REPLY {
            return Err(Error::corrupt(format!("option reply of {len} bytes is too long")));
        }
        if len == 0 {
            return self.body(option, kind, Wire(&[]));
        }
        Ok(self.want(State::Body(option, kind), len as usize))
    }

    fn body(&mut self, option: u32, kind: u32, wire: Wire<'_>) -> Result<Next> {
        if kind & option_reply::ERROR != 0 {
            return self.refused(option, kind, wire);
        }
        match (option, kind) {
            (option::STARTTLS, option_reply::ACK) => Ok(Next::StartTls),
            (option::EXTENDED_HEADERS, option_reply::ACK) => {
                self.export.reply_mode = ReplyMode::Extended;
                Ok(self.ask_context())
            }
            (option::STRUCTURED_REPLY, option_reply::ACK) => {
                self.export.reply_mode = ReplyMode::Structured;
                Ok(self.ask_context())
            }
            (option::SET_META_CONTEXT, option_reply::META_CONTEXT) => {
                self.context(wire)?;
                Ok(self.want(State::Reply(option), 20))
            }
            (option::SET_META_CONTEXT, option_reply::ACK) => Ok(self.go()),
            (option::GO, option_reply::INFO) => {
                self.info(wire)?;
                Ok(self.want(State::Reply(option), 20))
            }
            (option::GO, option_reply::ACK) if self.has_export => Ok(self.want(State::Done, 0)),
            (option::GO, option_reply::ACK) => Err(Error::corrupt("broken server omitted NBD_INFO_EXPORT")),
            _ => Err(Error::corrupt(format!("Unexpected reply type {kind:#x}"))),
        }
    }

    fn ask_context(&mut self) -> Next {
        let mut data = Vec::new();
        put_text(&mut data, &self.client_options.export);
        data.extend_from_slice(&1_u32.to_be_bytes());
        put_text(&mut data, &self.client_options.context);
        self.ask(option::SET_META_CONTEXT, &data)
    }

    fn context(&mut self, mut wire: Wire<'_>) -> Result<()> {
        let wanted = &self.client_options.context;
        if wire.0.len() <= 4 {
            return Err(Error::corrupt(format!(
                "Failed to negotiate meta context, server answered with unexpected length {}",
                wire.0.len()
            )));
        }
        let number = wire.u32()?;
        if *wire.0 != *name::to_bytes(wanted) {
            return Err(Error::corrupt(format!(
                "Failed to negotiate meta context '{wanted}', server answered with different context '{}'",
                String::from_utf8_lossy(wire.0)
            )));
        }
        if self.export.context.replace(number).is_some() {
            return Err(Error::corrupt("Server answered with more than one context"));
        }
        Ok(())
    }

    fn go(&mut self) -> Next {
        let mut data = Vec::new();
        put_text(&mut data, &self.client_options.export);
        data.extend_from_slice(&1_u16.to_be_bytes());
        data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        self.ask(option::GO, &data)
    }

    fn info(&mut self, mut wire: Wire<'_>) -> Result<()> {
        let len = wire.0.len();
        if len < 2 {
            return Err(Error::corrupt(format!("NBD_REP_INFO length {len} is too short")));
        }
        let kind = wire.u16()?;
        let rest = len - 2;
        match kind {
            info::EXPORT if rest != 10 => Err(Error::corrupt(format!(
                "remaining export info len {rest} is unexpected size"
            ))),
            info::EXPORT => {
                let (len, flags) = (wire.u64()?, wire.u16()?);
                self.set_export(len, flags)
            }
            info::BLOCK_SIZE if rest != 12 => Err(Error::corrupt(format!(
                "remaining export info len {rest} is unexpected size"
            ))),
            info::BLOCK_SIZE => {
                let (min, _preferred, max) = (wire.u32()?, wire.u32()?, wire.u32()?);
                self.block_sizes(min, max)
            }
            // Names and descriptions, which were not requested.
            _ => Ok(()),
        }
    }

    fn block_sizes(&mut self, min: u32, max: u32) -> Result<()> {
        if !min.is_power_of_two() {
            return Err(Error::corrupt(format!(
                "server minimum block size {min} is not a power of two"
            )));
        }
        if min > MAX_MIN_BLOCK {
            return Err(Error::corrupt(format!(
                "server minimum block size {min} is larger than {MAX_MIN_BLOCK}"
            )));
        }
        let fitting = max.min(MAX_REQUEST) / min * min;
        if fitting < min.max(SECTOR) {
            return Err(Error::corrupt(format!(
                "server maximum block size {max} is not valid"
            )));
        }
        (self.export.min_block, self.export.max_block) = (min, fitting);
        Ok(())
    }

    /// Handles an error reply to an option.
    fn refused(&mut self, option: u32, kind: u32, wire: Wire<'_>) -> Result<Next> {
        match option {
            option::EXTENDED_HEADERS => return Ok(self.ask(option::STRUCTURED_REPLY, &[])),
            // Without structured replies there is no block status: everything is data.
            option::STRUCTURED_REPLY | option::SET_META_CONTEXT => {
                self.export.context = None;
                return Ok(self.go());
            }
            option::GO if kind == option_reply::ERR_UNSUP => return Ok(self.name_export()),
            option::STARTTLS if kind == option_reply::ERR_UNSUP => {
                return Err(Error::unsupported("Server don't support STARTTLS option"));
            }
            _ => {}
        }
        let which = format!("option {option} ({})", option_name(option));
        let words = match kind {
            option_reply::ERR_UNSUP => format!("Unsupported {which}"),
            option_reply::ERR_POLICY => format!("Denied by server for {which}"),
            option_reply::ERR_INVALID => format!("Invalid parameters for {which}"),
            option_reply::ERR_PLATFORM => format!("Server lacks support for {which}"),
            option_reply::ERR_TLS_REQD => format!("TLS negotiation required before {which}"),
            option_reply::ERR_UNKNOWN => "Requested export not available".to_owned(),
            option_reply::ERR_SHUTDOWN => format!("Server shutting down before {which}"),
            option_reply::ERR_BLOCK_SIZE_REQD => format!("Server requires INFO_BLOCK_SIZE for {which}"),
            _ => format!("Unknown error code when asking for {which}"),
        };
        let mut hints = Vec::new();
        if kind == option_reply::ERR_TLS_REQD {
            hints.push("Did you forget a valid tls-creds?".to_owned());
        }
        if !wire.0.is_empty() {
            hints.push(format!("server reported: {}", shown(wire.0)));
        }
        let category = match kind {
            option_reply::ERR_UNKNOWN => ErrorKind::NotFound,
            option_reply::ERR_POLICY | option_reply::ERR_TLS_REQD => ErrorKind::Permission,
            _ => ErrorKind::Unsupported,
        };
        let error = Error::new(category, words);
        Err(hints.into_iter().fold(error, Error::and_hint))
    }
}

fn put_text(data: &mut Vec<u8>, text: &str) {
    // Names are limited to `MAX_NAME` bytes.
    let text = name::to_bytes(text);
    let len = saturating_u32(text.len());
    data.extend_from_slice(&len.to_be_bytes());
    data.extend_from_slice(&text);
}

/// A text of the server without control characters.
fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn no_starttls() -> Error {
    Error::unsupported("Server does not support STARTTLS")
}

fn option_name(option: u32) -> &'static str {
    match option {
        option::EXPORT_NAME => "export name",
        option::ABORT => "abort",
        3 => "list",
        4 => "peek export",
        option::STARTTLS => "starttls",
        6 => "info",
        option::GO => "go",
        option::STRUCTURED_REPLY => "structured reply",
        9 => "list meta context",
        option::SET_META_CONTEXT => "set meta context",
        option::EXTENDED_HEADERS => "extended headers",
        _ => "<unknown>",
    }
}
