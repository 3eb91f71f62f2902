//! `--object throttle-group`: limits that several `throttle` nodes share.
//!
//! Each limit has two names: `x-iops-total`, and `limits.iops-total` as in QMP.

use std::sync::Arc;

use diskimage::{BucketConfig, Object, ThrottleGroup, ThrottleLimits};

use super::parameters::{Parameters, wrong_type};
use crate::words::Stop;

/// The type of these objects.
pub(super) const TYPE: &str = "throttle-group";

const KINDS: [&str; 3] = ["total", "read", "write"];

/// Parses the parameters of a group.
///
/// # Errors
/// A parameter is unknown or has an invalid value. [`Stop::Text`] for `help`.
pub(super) fn read(mut parameters: Parameters) -> Result<(String, Object), Stop> {
    if parameters.wants_help {
        return Err(Stop::Text(help()));
    }
    let id = parameters.take_id()?;
    if parameters.has("limits") {
        return Err(wrong_type("limits", "object"));
    }
    let limits = ThrottleLimits {
        bytes: take_rates(&mut parameters, "bps")?,
        requests: take_rates(&mut parameters, "iops")?,
        request_size: take(&mut parameters, "iops-size")?.unwrap_or(0),
    };
    parameters.finish(&id)?;
    Ok((id, Object::ThrottleGroup(Arc::new(ThrottleGroup::new(limits)?))))
}

fn take_rates(parameters: &mut Parameters, unit: &str) -> Result<[BucketConfig; 3], Stop> {
    let mut rates = [BucketConfig::default(); 3];
    for (rate, kind) in rates.iter_mut().zip(KINDS) {
        let name = format!("{unit}-{kind}");
        *rate = BucketConfig {
            average: take(parameters, &name)?.unwrap_or(0),
            max: take(parameters, &format!("{name}-max"))?.unwrap_or(0),
            max_length: take_length(parameters, &format!("{name}-max-length"))?,
        };
    }
    Ok(rates)
}

/// Takes the number of a limit.
fn take(parameters: &mut Parameters, name: &str) -> Result<Option<u64>, Stop> {
    let mut found = None;
    for prefix in ["x-", "limits."] {
        if let Some(number) = parameters.take_integer(&format!("{prefix}{name}"))? {
            if number < 0 && prefix == "x-" {
                return Err(Stop::wrong("Property values cannot be negative"));
            }
            // A negative one is larger than any limit may be.
            found = Some(u64::try_from(number).unwrap_or(u64::MAX));
        }
    }
    Ok(found)
}

/// Takes the length of a burst in seconds.
fn take_length(parameters: &mut Parameters, name: &str) -> Result<u64, Stop> {
    let by_property = parameters.has(&format!("x-{name}"));
    match take(parameters, name)? {
        None => Ok(1),
        Some(seconds) if seconds <= u32::MAX.into() => Ok(seconds),
        // qemu-img prints "therange" without a space.
        Some(_) if by_property => Err(Stop::wrong(format!(
            "x-{name} value must be in therange [0, {}]",
            u32::MAX
        ))),
        Some(_) => Err(Stop::wrong(format!(
            "{name} value must be in the range [0, {}]",
            u32::MAX
        ))),
    }
}

fn help() -> String {
    let mut names: Vec<_> = ["bps", "iops"]
        .iter()
        .flat_map(|unit| KINDS.map(|kind| format!("x-{unit}-{kind}")))
        .flat_map(|name| [format!("{name}-max-length"), format!("{name}-max"), name])
        .chain(["x-iops-size".to_owned()])
        .collect();
    // As in qemu-img, a name comes after the longer names that begin with it.
    names.sort_by_key(|name| format!("{name}="));
    let mut text = format!("{TYPE} options:\n  limits=<ThrottleLimits>\n");
    for name in names {
        text.push_str(&format!("  {name}=<int>\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str) -> Result<(), Stop> {
        let mut parameters = Parameters::read(text)?;
        parameters.take_text("qom-type")?;
        read(parameters).map(drop)
    }

    #[test]
    fn both_names_of_a_limit_are_read() {
        for text in [
            "throttle-group,id=a,x-iops-total=0x10",
            "throttle-group,id=a,limits.iops-total=10,limits.iops-total-max=50",
            r#"{"qom-type":"throttle-group","id":"a","limits":{"iops-total":10}}"#,
            "throttle-group,id=a",
        ] {
            assert_eq!(outcome(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn invalid_limits_are_refused_with_the_messages_of_qemu_img() {
        for (text, message) in [
            ("x-bps-total=-1", "Property values cannot be negative"),
            ("x-bps-total=a", "Parameter 'x-bps-total' expects integer"),
            (
                "limits=5",
                "Invalid parameter type for 'limits', expected: object",
            ),
            ("limits.foo=1", "Parameter 'limits.foo' is unexpected"),
            ("x-bps-total-max-length=5", "burst length set without burst rate"),
            (
                "x-bps-read=1,x-bps-read-max=2,x-bps-read-max-length=4294967296",
                "x-bps-read-max-length value must be in therange [0, 4294967295]",
            ),
        ] {
            let text = format!("throttle-group,id=a,{text}");
            assert_eq!(outcome(&text), Err(Stop::wrong(message)), "{text}");
        }
    }
}
