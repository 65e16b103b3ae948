//! The memory that this process may use: that of the machine, or the least of its control groups.

use std::path::{Path, PathBuf};

/// Bytes that the process may use; `None` if nothing says how many.
pub(crate) fn memory_limit() -> Option<u64> {
    limit_of(|file| std::fs::read_to_string(file).ok())
}

fn limit_of(read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    // "max" is no number: no limit.
    let limits = files(&groups).into_iter().filter_map(|file| read(&file)?.trim().parse().ok());
    limits.chain(machine(&read(Path::new("/proc/meminfo")).unwrap_or_default())).min()
}

/// The files with the limits of the control groups in the text of `/proc/self/cgroup`. The limit of a group holds for
/// all groups in it, so all above the process's own count. Within a container the root is the container's group.
fn files(groups: &str) -> Vec<PathBuf> {
    let groups = groups.lines().chain(["0::/", "0:memory:/"]);
    let limits = groups.filter_map(|group| {
        let mut parts = group.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            old if old.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let file = move |group: &Path| Path::new(root).join(group).join(name);
        Some(Path::new(path.trim_start_matches('/')).ancestors().map(file).collect::<Vec<_>>())
    });
    limits.flatten().collect()
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

    #[test]
    fn the_least_limit_of_all_groups_around_the_process_counts() {
        const MEMORY: (&str, &str) = ("/proc/meminfo", "MemTotal: 8 kB\n");
        let new = ("/proc/self/cgroup", "0::/a/b.slice/c.scope\n");
        let old = ("/proc/self/cgroup", "5:cpu:/x\n4:hugetlb,memory:/docker/id\n");
        for (files, want) in [
            (&[][..], None),
            (&[MEMORY], Some(8192)),
            (&[MEMORY, new], Some(8192)),
            (&[MEMORY, new, ("/sys/fs/cgroup/a/b.slice/c.scope/memory.max", "max\n")], Some(8192)),
            (&[MEMORY, new, ("/sys/fs/cgroup/a/b.slice/c.scope/memory.max", "5000\n")], Some(5000)),
            (&[MEMORY, new, ("/sys/fs/cgroup/a/memory.max", "4000\n")], Some(4000)),
            (&[MEMORY, new, ("/sys/fs/cgroup/memory.max", "3000\n")], Some(3000)),
            (&[MEMORY, new, ("/sys/fs/cgroup/other/memory.max", "1\n")], Some(8192)),
            (&[MEMORY, old, ("/sys/fs/cgroup/memory/docker/memory.limit_in_bytes", "2000\n")], Some(2000)),
            (&[MEMORY, old, ("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1\n")], Some(8192)),
            (&[("/sys/fs/cgroup/memory/memory.limit_in_bytes", "7000\n")], Some(7000)),
        ] {
            let read = |path: &Path| {
                let found = files.iter().find(|(name, _)| Path::new(name) == path);
                found.map(|(_, text)| (*text).to_owned())
            };
            assert_eq!(limit_of(read), want, "{files:?}");
        }
    }
}
