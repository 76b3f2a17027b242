//! One script: loading, running, calling.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::Cell;

use rhai::{AST, CallFnOptions, Dynamic, Engine, EvalAltResult, FnAccess, Scope};
use skerry_sandbox_rt::abi::script::{Defined, Ended, Granted, Limits, Refusal, Value};

use crate::ended::{ended, unparsed};
use crate::host;
use crate::values::{from_engine, to_engine};

/// What the engine calls functions that have no name.
const ANONYMOUS: &str = "anon$";

/// A script and what it has made.
pub(crate) struct Loaded {
    engine: Engine,
    granted: Vec<Granted>,
    /// As it was loaded.
    script: AST,
    /// The functions that there are: the script's, and those that were evaluated since it was run.
    library: AST,
    /// Those of them that can be called from outside.
    public: BTreeMap<String, Vec<Vec<String>>>,
    /// The variables at the top.
    scope: Scope<'static>,
    operations: Rc<Cell<u64>>,
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Zero is no limit to the engine.
fn at_least_one(value: u64) -> usize {
    size(value).max(1)
}

fn engine(limits: &Limits, operations: &Rc<Cell<u64>>) -> Engine {
    let mut engine = Engine::new();
    engine
        .set_max_call_levels(size(limits.calls))
        .set_max_expr_depths(at_least_one(limits.nesting), at_least_one(limits.nesting))
        .set_max_string_size(at_least_one(limits.string))
        .set_max_array_size(at_least_one(limits.array))
        .set_max_map_size(at_least_one(limits.map))
        .set_max_variables(size(limits.variables))
        .set_max_functions(size(limits.functions));
    // The engine's own count forgets what functions did that were called by its own: `array.map(f)`.
    if let Some(most) = limits.operations {
        let count = operations.clone();
        engine.on_progress(move |_| {
            let done = count.get() + 1;
            count.set(done);
            (done > most).then_some(Dynamic::UNIT)
        });
    }
    engine
}

impl Loaded {
    pub(crate) fn new(source: &str, limits: &Limits, granted: Vec<Granted>) -> Result<Self, Ended> {
        let operations = Rc::new(Cell::new(0));
        let mut engine = engine(limits, &operations);
        host::register(&mut engine, &granted);
        let script = engine.compile(source).map_err(|error| unparsed(&error))?;
        let mut loaded = Self {
            library: AST::empty(),
            public: BTreeMap::new(),
            engine,
            granted,
            script,
            scope: Scope::new(),
            operations,
        };
        loaded.forget();
        Ok(loaded)
    }

    /// Takes back what runs have made.
    fn forget(&mut self) {
        self.scope = Scope::new();
        self.library = self.script.clone_functions_only();
        self.list();
    }

    fn list(&mut self) {
        self.public.clear();
        let functions = self.library.iter_functions().filter(|function| {
            function.access == FnAccess::Public && !function.name.starts_with(ANONYMOUS)
        });
        for function in functions {
            let parameters = function.params.iter().map(ToString::to_string).collect();
            let all = self.public.entry(function.name.to_string()).or_default();
            all.push(parameters);
        }
        for all in self.public.values_mut() {
            all.sort_by_key(Vec::len);
        }
    }

    pub(crate) fn functions(&self) -> Vec<Defined> {
        let functions = self.public.iter().flat_map(|(name, all)| {
            all.iter().map(|parameters| Defined {
                name: name.clone(),
                parameters: parameters.clone(),
            })
        });
        functions.collect()
    }

    pub(crate) fn operations(&self) -> u64 {
        self.operations.get()
    }

    fn finish(
        &self,
        result: Result<Dynamic, Box<EvalAltResult>>,
        called: Option<&str>,
    ) -> Result<Value, Ended> {
        let value = result.or_else(|error| ended(*error, &self.granted, called))?;
        from_engine(value).map_err(Ended::from)
    }

    pub(crate) fn run(&mut self) -> Result<Value, Ended> {
        self.operations.set(0);
        self.forget();
        let result = self
            .engine
            .eval_ast_with_scope(&mut self.scope, &self.script);
        self.finish(result, None)
    }

    pub(crate) fn eval(&mut self, source: &str) -> Result<Value, Ended> {
        self.operations.set(0);
        let part = self.engine.compile_with_scope(&self.scope, source);
        let part = part.map_err(|error| unparsed(&error))?;
        self.library.combine(part);
        self.list();
        let result = self
            .engine
            .eval_ast_with_scope(&mut self.scope, &self.library);
        self.library.clear_statements();
        self.finish(result, None)
    }

    pub(crate) fn call(&mut self, name: &str, arguments: Vec<Value>) -> Result<Value, Ended> {
        self.operations.set(0);
        self.check(name, arguments.len())?;
        let arguments: Vec<Dynamic> = arguments.into_iter().map(to_engine).collect();
        let options = CallFnOptions::new().eval_ast(false);
        let result = self.engine.call_fn_with_options(
            options,
            &mut self.scope,
            &self.library,
            name,
            arguments,
        );
        self.finish(result, Some(name))
    }

    /// Whether there is such a function, with so many parameters.
    fn check(&self, name: &str, given: usize) -> Result<(), Refusal> {
        let Some(all) = self.public.get(name) else {
            return Err(Refusal::NoFunction(String::from(name)));
        };
        if all.iter().any(|parameters| parameters.len() == given) {
            return Ok(());
        }
        Err(Refusal::Arity {
            name: String::from(name),
            takes: all
                .iter()
                .map(|parameters| parameters.len() as u32)
                .collect(),
            given: given as u32,
        })
    }
}
