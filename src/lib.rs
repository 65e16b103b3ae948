//! Zap
pub mod policy;
