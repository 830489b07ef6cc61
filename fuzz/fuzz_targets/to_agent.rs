#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mirrorfs::wire::probe::to_agent(bytes));
