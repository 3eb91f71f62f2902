//! Placeholder of the workspace's first commit.

fn main() {}
