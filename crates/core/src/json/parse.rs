//! A JSON parser with the extension of `qemu-img` (strings in single quotes) and its error messages.

use super::value::Value;
use crate::{Error, Result, name};

/// The limit of nesting, which bounds the stack of the recursive parser.
const MAX_DEPTH: usize = 1024;

/// Reads one JSON value.
///
/// # Errors
/// `JSON parse error, ...`, and text without a value or with more than one.
pub fn parse(text: &str) -> Result<Value> {
    let mut parser = Parser { rest: text, depth: 0 };
    parser.skip_space();
    if parser.rest.is_empty() {
        return Err(Error::invalid("Expecting a JSON value"));
    }
    let first = parser.token()?;
    let value = parser.value(first)?;
    parser.skip_space();
    if parser.rest.is_empty() {
        Ok(value)
    } else {
        Err(Error::invalid("Expecting at most one JSON value"))
    }
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// One of `{}[]:,`.
    Mark(char),
    Scalar(Value),
}

impl Parser<'_> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
    }

    fn token(&mut self) -> Result<Token> {
        self.skip_space();
        let Some(first) = self.rest.chars().next() else {
            return Err(wrong("premature EOI"));
        };
        match first {
            '{' | '}' | '[' | ']' | ':' | ',' => {
                self.rest = &self.rest[1..];
                Ok(Token::Mark(first))
            }
            '"' | '\'' => self.string(first).map(|text| Token::Scalar(Value::Text(text))),
            '-' | '0'..='9' => self.number().map(Token::Scalar),
            'a'..='z' | 'A'..='Z' => self.keyword().map(Token::Scalar),
            other => Err(wrong(&format!("stray '{other}'"))),
        }
    }

    fn value(&mut self, first: Token) -> Result<Value> {
        match first {
            Token::Scalar(value) => Ok(value),
            Token::Mark('{') => self.nested(Self::object),
            Token::Mark('[') => self.nested(Self::list),
            Token::Mark(_) => Err(wrong("expecting value")),
        }
    }

    fn nested(&mut self, read: fn(&mut Self) -> Result<Value>) -> Result<Value> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Error::invalid("JSON nesting depth limit exceeded"));
        }
        let value = read(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn object(&mut self) -> Result<Value> {
        let mut members: Vec<(std::borrow::Cow<'static, str>, Value)> = Vec::new();
        let mut token = self.token()?;
        if token == Token::Mark('}') {
            return Ok(Value::Object(members));
        }
        loop {
            let name = match self.value(token)? {
                Value::Text(name) => name,
                _ => return Err(wrong("key is not a string in object")),
            };
            if self.token()? != Token::Mark(':') {
                return Err(wrong("missing : in object pair"));
            }
            let first = self.token()?;
            let value = self.value(first)?;
            if members.iter().any(|(other, _)| *other == name) {
                return Err(wrong("duplicate key"));
            }
            members.push((name.into(), value));
            match self.token()? {
                Token::Mark('}') => return Ok(Value::Object(members)),
                Token::Mark(',') => token = self.token()?,
                _ => return Err(wrong("expected separator in dict")),
            }
        }
    }

    fn list(&mut self) -> Result<Value> {
        let mut values = Vec::new();
        let mut token = self.token()?;
        if token == Token::Mark(']') {
            return Ok(Value::List(values));
        }
        loop {
            values.push(self.value(token)?);
            match self.token()? {
                Token::Mark(']') => return Ok(Value::List(values)),
                Token::Mark(',') => token = self.token()?,
                _ => return Err(wrong("expected separator in list")),
            }
        }
    }

    fn string(&mut self, quote: char) -> Result<String> {
        let whole = self.rest;
        let mut text = String::new();
        let mut chars = whole.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = &whole[at + c.len_utf8()..];
                    return Ok(text);
                }
                '\\' => {
                    let Some((_, escaped)) = chars.next() else {
                        break;
                    };
                    if escaped != 'u' {
                        text.push(simple_escape(escaped)?);
                        continue;
                    }
                    let (decoded, len) = unicode_escape(&whole[at..], quote)?;
                    name::push_char(&mut text, decoded);
                    // `\u` has been consumed; all digits are one byte long.
                    for _ in 2..len {
                        chars.next();
                    }
                }
                c if c.is_control() && c.is_ascii() => {
                    return Err(wrong(&format!("stray '{}'", &whole[..=at])));
                }
                c => text.push(c),
            }
        }
        Err(wrong(&format!("stray '{whole}'")))
    }

    fn number(&mut self) -> Result<Value> {
        let whole = self.rest;
        let bytes = whole.as_bytes();
        let digits = |from: usize| {
            from + bytes[from..]
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count()
        };
        let start = usize::from(bytes[0] == b'-');
        let mut end = digits(start);
        if bytes.get(start) == Some(&b'0') && end > start + 1 {
            return Err(wrong(&format!("stray '{}'", &whole[..start + 2])));
        }
        let mut is_wrong = end == start;
        let mut real = false;
        if bytes.get(end) == Some(&b'.') {
            real = true;
            let fraction = digits(end + 1);
            is_wrong |= fraction == end + 1;
            end = fraction;
        }
        if matches!(bytes.get(end), Some(b'e' | b'E')) {
            real = true;
            let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
            let exponent = digits((end + 1 + sign).min(bytes.len()));
            is_wrong |= exponent == end + 1 + sign;
            end = exponent;
        }
        if is_wrong {
            // As in qemu-img, the message includes the first character that does not belong to a number.
            let shown = whole[end..].chars().next().map_or(end, |c| end + c.len_utf8());
            return Err(wrong(&format!("stray '{}'", &whole[..shown])));
        }
        let (number, rest) = whole.split_at(end);
        self.rest = rest;
        match number.parse::<i128>() {
            Ok(int) if !real && (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(&int) => {
                Ok(Value::Int(int))
            }
            _ => Ok(Value::Real(number.to_owned())),
        }
    }

    fn keyword(&mut self) -> Result<Value> {
        let end = self
            .rest
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match word {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            other => Err(wrong(&format!("invalid keyword '{other}'"))),
        }
    }
}

fn simple_escape(escaped: char) -> Result<char> {
    Ok(match escaped {
        '"' | '\'' | '\\' | '/' => escaped,
        'b' => '\u{8}',
        'f' => '\u{c}',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        _ => return Err(wrong("invalid escape sequence in string")),
    })
}

/// Decodes the `\uXXXX` at the start of `text`, or two of them for a surrogate pair. Also returns their length.
fn unicode_escape(text: &str, quote: char) -> Result<(char, usize)> {
    let unit = |at: usize| {
        let digits = text
            .get(at..)
            .and_then(|rest| rest.strip_prefix("\\u"))?
            .get(..4)?;
        let hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        hex.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
    };
    let first = unit(0);
    let decoded = match first {
        Some(high @ 0xd800..0xdc00) => {
            let low = unit(6);
            let pair = char::decode_utf16([Some(high), low].into_iter().flatten()).next();
            pair.and_then(std::result::Result::ok).map(|c| (c, 12))
        }
        Some(unit) => char::from_u32(unit.into()).map(|c| (c, 6)),
        None => None,
    };
    decoded.ok_or_else(|| {
        // The message has up to six characters of the string, including its closing quote.
        let mut shown = text.split_inclusive(quote).next().unwrap_or(text);
        if let Some((end, _)) = shown.char_indices().nth(6) {
            shown = &shown[..end];
        }
        wrong(&format!("{shown} is not a valid Unicode character"))
    })
}

fn wrong(what: &str) -> Error {
    Error::invalid(format!("JSON parse error, {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        parse(text).expect_err("wrong").chain()
    }

    #[test]
    fn values_are_read_with_either_quotes() {
        let value =
            parse(r#" {'a': [1, -2, true, null], "b": {"c": "x\u00e9\ud83d\ude00\n'"}, 'd': 1.5e3} "#);
        assert_eq!(
            value.map(|value| value.compact()).map_err(|error| error.chain()),
            Ok(r#"{"a": [1, -2, true, null], "b": {"c": "x\u00E9\uD83D\uDE00\n'"}, "d": 1.5e3}"#.to_owned())
        );
    }

    #[test]
    fn errors_are_those_of_qemu_img() {
        for (text, what) in [
            ("x", "invalid keyword 'x'"),
            ("{'a'}", "missing : in object pair"),
            ("{'a':}", "expecting value"),
            ("{'a':1", "premature EOI"),
            ("{'a':1 'b':2}", "expected separator in dict"),
            ("{1:2}", "key is not a string in object"),
            ("{'a':[1 2]}", "expected separator in list"),
            ("{'a':'x", "stray ''x'"),
            ("{'a':-}", "stray '-}'"),
            ("{'a':1.}", "stray '1.}'"),
            ("{'a':'\\q'}", "invalid escape sequence in string"),
            ("{'a':%s}", "stray '%'"),
            ("{'a':1,'a':2}", "duplicate key"),
        ] {
            assert_eq!(message(text), format!("JSON parse error, {what}"), "{text}");
        }
        assert_eq!(message(""), "Expecting a JSON value");
        assert_eq!(message("{'a':1}x"), "Expecting at most one JSON value");
    }

    #[test]
    fn depth_is_bounded() {
        assert_eq!(message(&"[".repeat(100_000)), "JSON nesting depth limit exceeded");
    }
}
