//! Codecs and the reader: what is served is what was stored, or an error.

mod codec;
mod damage;
mod economy;
mod reader;
mod support;
