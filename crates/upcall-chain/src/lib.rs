//! A request's walk through the filters, as pure state machines
