//! The memory that this process may use: that of the machine, or of its control group.

/// Bytes that the process may use; `None` if nothing says how many.
pub(crate) fn memory_limit() -> Option<u64> {
    let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = group.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let files = [
        format!("/sys/fs/cgroup{path}/memory.max"),
        "/sys/fs/cgroup/memory.max".to_owned(),
        "/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned(),
    ];
    // "max" is no number: no limit.
    let limits = files.iter().filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok());
    limits.chain(machine(&std::fs::read_to_string("/proc/meminfo").ok()?)).min()
}

/// The memory of the machine, from the text of `/proc/meminfo`.
fn machine(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_machine_is_read_in_kibibytes() {
        assert_eq!(machine("MemTotal:       16318480 kB\nMemFree: 1 kB\n"), Some(16_318_480 * 1024));
        assert_eq!((machine(""), machine("MemTotal: x kB")), (None, None));
    }
}
