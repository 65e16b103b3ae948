//! stub
use crate::protocol::usage::Usage;
#[derive(Debug)]
pub(crate) struct BodyUsage;
impl crate::protocol::usage::Usage {
    pub(crate) fn of_body(_: &[u8]) -> Option<Usage> {
        None
    }
}
impl BodyUsage {
    pub(crate) fn new() -> Self {
        BodyUsage
    }
    pub(crate) fn push(&mut self, _: &[u8]) {}
    pub(crate) fn finish(self) -> Option<Usage> {
        None
    }
}
