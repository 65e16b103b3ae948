//! Time as a number of nanoseconds, and dates as a number of days.

use std::fmt;
use std::time::SystemTime;

/// Monotonic time in nanoseconds since the process started.
pub type Nanos = u64;

/// A second in [`Nanos`].
pub const SECOND: Nanos = 1_000_000_000;

/// A millisecond in [`Nanos`].
pub(crate) const MILLI: Nanos = 1_000_000;

/// A day in UTC: the number of days since 1970-01-01. Written as `2026-11-25`.
///
/// The conversions follow Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms": a year begins in March, so
/// that the leap day is its last day; an era is 400 years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Day(u32);

impl Day {
    /// Returns the day of a wall-clock time. A time before 1970 counts as 1970-01-01.
    pub(crate) fn of(wall: SystemTime) -> Day {
        Self::of_unix(wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs())
    }

    /// The day that is so many seconds after the Unix epoch.
    pub(crate) fn of_unix(secs: u64) -> Day {
        Day(u32::try_from(secs / 86_400).unwrap_or(u32::MAX))
    }

    /// Reads `2026-11-25`. Returns `None` if the text has another form, or if there is no such day from 1970 to 9999.
    pub(crate) fn parse(text: &str) -> Option<Day> {
        let digits = text.bytes().enumerate().all(|(at, b)| match at {
            4 | 7 => b == b'-',
            _ => b.is_ascii_digit(),
        });
        if text.len() != 10 || !digits {
            return None;
        }
        let (year, month, day) = (text[..4].parse().ok()?, text[5..7].parse().ok()?, text[8..].parse().ok()?);
        if year < 1970 || !(1..=12).contains(&month) || day == 0 {
            return None;
        }
        let found = Day::of_civil(year, month, day);
        // February 30 is March 1 or 2.
        (found.civil() == (u64::from(year), u64::from(month), u64::from(day))).then_some(found)
    }

    /// The day of a date from 1970 on; `month` is from 1 to 12.
    fn of_civil(year: u32, month: u32, day: u32) -> Day {
        let year = if month <= 2 { year - 1 } else { year };
        let (era, yoe) = (year / 400, year % 400);
        let doy = (153 * if month > 2 { month - 3 } else { month + 9 } + 2) / 5 + day - 1;
        let doe = yoe * 365 + yoe / 4 - yoe / 100 + doy;
        Day((era * 146_097 + doe).saturating_sub(719_468))
    }

    /// Year, month from 1, day of the month from 1.
    fn civil(self) -> (u64, u64, u64) {
        let z = u64::from(self.0) + 719_468;
        let (era, doe) = (z / 146_097, z % 146_097);
        let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
        (yoe + era * 400 + u64::from(month <= 2), month, day)
    }

    /// The number of days since 1970-01-01.
    pub(crate) fn number(self) -> u32 {
        self.0
    }

    /// The first day of the month of this day.
    pub(crate) fn first_of_month(self) -> Day {
        let (_, _, day) = self.civil();
        self.minus(u32::try_from(day).unwrap_or(1) - 1)
    }

    /// The first day of the next month.
    pub(crate) fn first_of_next_month(self) -> Day {
        Day(self.first_of_month().0.saturating_add(31)).first_of_month()
    }

    /// The next day.
    pub(crate) fn next(self) -> Day {
        Day(self.0.saturating_add(1))
    }

    /// The day that is `days` before this day, or 1970-01-01.
    pub(crate) fn minus(self, days: u32) -> Day {
        Day(self.0.saturating_sub(days))
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.civil();
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_four_centuries_is_written_and_read_back() {
        let mut before = String::new();
        for number in 0..146_097 + 366 {
            let text = Day(number).to_string();
            assert_eq!(Day::parse(&text), Some(Day(number)), "{text}");
            assert!(text > before, "{text} after {before}");
            let first = Day(number).first_of_month();
            assert_eq!(first.to_string(), format!("{}01", &text[..8]));
            let next = Day(number).first_of_next_month();
            assert!(next > Day(number) && next.minus(1).first_of_month() == first, "{text}: {next}");
            assert_eq!(Day(number).next().minus(1), Day(number));
            before = text;
        }
        assert_eq!(Day(20_782).to_string(), "2026-11-25");
    }

    #[test]
    fn only_days_that_exist_are_read() {
        for text in [
            "",
            "2026-11-31",
            "2026-02-29",
            "2100-02-29",
            "2026-00-10",
            "2026-13-10",
            "2026-11-00",
            "1969-12-31",
            "2026-1-01",
            "2026-11-1",
            "2026/11/01",
            "2026-11-011",
            "+026-11-01",
            "2026-11-é",
            "20261101",
            "2026-11-01T00:00:00Z",
        ] {
            assert_eq!(Day::parse(text), None, "{text}");
        }
        assert!(Day::parse("2028-02-29").is_some() && Day::parse("9999-12-31").is_some());
    }
}
