//! What a backend can tell of how its processors spend their time.

/// An optional ability of a [`Vm`](crate::Vm): it counts what its processors do. To look costs them
/// nothing.
pub trait Statistics: Send + Sync {
    /// What processor `id` has counted since it was made, by name; empty where there is none. What a
    /// processor counts while it runs guest code it may show only when it leaves it:
    /// [`Statistics::refresh`] has it do so.
    fn counters(&self, id: u32) -> Vec<(&'static str, u64)>;

    /// Has the processors that run guest code show what they have counted, within moments.
    fn refresh(&self);

    /// What a processor can be at, by name.
    fn activities(&self) -> &'static [&'static str];

    /// What processor `id` is at now, as an index into [`Statistics::activities`]; to be sampled.
    fn activity(&self, id: u32) -> Option<usize>;
}
