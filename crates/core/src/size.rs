//! Sizes with suffixes.
