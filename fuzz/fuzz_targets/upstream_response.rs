#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| zap::fuzzing::upstream_response(data));
