//! The attributes of `skerry-sandbox-rt`; documented there.

use proc_macro::TokenStream;
use proc_macro2::TokenStream as Tokens;
use quote::quote;
use syn::spanned::Spanned;
use syn::{Error, FnArg, ForeignItemFn, Ident, ItemFn, Pat, ReturnType, Signature, Type};

/// A parameter: its name and its type.
type Parameter = (Ident, Type);

/// The parameters of a function that can be called across the border.
fn parameters(signature: &Signature) -> Result<Vec<Parameter>, Error> {
    if let Some(token) = &signature.asyncness {
        return Err(Error::new(
            token.span(),
            "a call is answered when it returns: not async",
        ));
    }
    if !signature.generics.params.is_empty() {
        let span = signature.generics.span();
        return Err(Error::new(
            span,
            "types that pass the border are fixed: no generics",
        ));
    }
    signature
        .inputs
        .iter()
        .map(|input| match input {
            FnArg::Receiver(receiver) => Err(Error::new(receiver.span(), "not a method")),
            FnArg::Typed(typed) => match &*typed.pat {
                Pat::Ident(name) => Ok((name.ident.clone(), (*typed.ty).clone())),
                other => Err(Error::new(other.span(), "a parameter needs a name")),
            },
        })
        .collect()
}

fn returned(output: &ReturnType) -> Tokens {
    match output {
        ReturnType::Default => quote!(()),
        ReturnType::Type(_, kind) => quote!(#kind),
    }
}

/// The signature of a function, `kind` being `Encode` or `Decode` for its parameters. Data, not code: it is
/// looked at once, and code that runs once is what starting a guest costs most.
fn description(name: &str, parameters: &[Parameter], kind: &Tokens, returns: &Tokens) -> Tokens {
    let names = parameters.iter().map(|(name, _)| name.to_string());
    let types = parameters.iter().map(|(_, kind)| kind);
    quote! {
        ::skerry_sandbox_rt::Signature {
            name: #name,
            parameters: &[#(::skerry_sandbox_rt::Named {
                name: #names,
                kind: <#types as ::skerry_sandbox_rt::abi::#kind>::type_name,
            }),*],
            returns: #returns::type_name,
        }
    }
}

fn guest(item: &ItemFn) -> Result<Tokens, Error> {
    let parameters = parameters(&item.sig)?;
    let (function, name) = (&item.sig.ident, item.sig.ident.to_string());
    let count = parameters.len() as u32;
    let names: Vec<_> = parameters.iter().map(|(name, _)| name).collect();
    let types = parameters.iter().map(|(_, kind)| kind);
    let indices = 0..count;
    let output = returned(&item.sig.output);
    let returns = quote! {
        <#output as ::skerry_sandbox_rt::abi::Returned>
    };
    let describe = description(&name, &parameters, &quote!(Decode), &returns);
    Ok(quote! {
        #item
        const _: () = {
            // Not names that a guest's own function may have: it is called from here.
            fn __skerry_call(
                from: &mut ::skerry_sandbox_rt::abi::Reader<'_>,
                out: &mut ::skerry_sandbox_rt::abi::Writer<'_>,
            ) -> ::core::result::Result<u32, ::skerry_sandbox_rt::abi::DecodeError> {
                from.arity(#count)?;
                #(let #names = from.argument::<#types>(#indices)?;)*
                from.end()?;
                ::core::result::Result::Ok(
                    ::skerry_sandbox_rt::abi::Returned::put(#function(#(#names),*), out),
                )
            }
            #[used]
            #[unsafe(link_section = "skerry_exports")]
            static EXPORT: ::skerry_sandbox_rt::Export = ::skerry_sandbox_rt::Export {
                call: __skerry_call,
                signature: #describe,
            };
        };
    })
}

fn host(item: &ForeignItemFn) -> Result<Tokens, Error> {
    let parameters = parameters(&item.sig)?;
    let (attributes, visibility, signature) = (&item.attrs, &item.vis, &item.sig);
    let name = item.sig.ident.to_string();
    let count = parameters.len() as u32;
    let names = parameters.iter().map(|(name, _)| name);
    let output = returned(&item.sig.output);
    let returns = quote! {
        <#output as ::skerry_sandbox_rt::HostReturned>
    };
    let describe = description(&name, &parameters, &quote!(Encode), &returns);
    Ok(quote! {
        #(#attributes)*
        #visibility #signature {
            #[used]
            #[unsafe(link_section = "skerry_imports")]
            static IMPORT: ::skerry_sandbox_rt::Import = ::skerry_sandbox_rt::Import {
                signature: #describe,
            };
            let answer = ::skerry_sandbox_rt::host_call(&IMPORT, |out| {
                out.put(&#count.to_le_bytes());
                #(::skerry_sandbox_rt::abi::Encode::encode(&#names, out);)*
            });
            <#output as ::skerry_sandbox_rt::HostReturned>::from_answer(#name, answer)
        }
    })
}

fn init(item: &ItemFn) -> Result<Tokens, Error> {
    if !parameters(&item.sig)?.is_empty() || !matches!(item.sig.output, ReturnType::Default) {
        let span = item.sig.span();
        return Err(Error::new(
            span,
            "it is called without arguments and returns nothing",
        ));
    }
    let function = &item.sig.ident;
    Ok(quote! {
        #item
        const _: () = {
            fn __skerry_call() {
                #function();
            }
            #[used]
            #[unsafe(link_section = "skerry_inits")]
            static INIT: ::skerry_sandbox_rt::Init = ::skerry_sandbox_rt::Init { call: __skerry_call };
        };
    })
}

fn expand<T: syn::parse::Parse>(
    item: TokenStream,
    made: impl FnOnce(&T) -> Result<Tokens, Error>,
) -> TokenStream {
    syn::parse::<T>(item)
        .and_then(|item| made(&item))
        .unwrap_or_else(Error::into_compile_error)
        .into()
}

/// Makes a function one that the host can call.
#[proc_macro_attribute]
pub fn guest_fn(_: TokenStream, item: TokenStream) -> TokenStream {
    expand(item, guest)
}

/// Declares a function of the host's: `#[host_fn] fn name(a: i32) -> Result<String, HostError>;`.
#[proc_macro_attribute]
pub fn host_fn(_: TokenStream, item: TokenStream) -> TokenStream {
    expand(item, host)
}

/// Makes a function run once, before the first call.
#[proc_macro_attribute]
pub fn guest_init(_: TokenStream, item: TokenStream) -> TokenStream {
    expand(item, init)
}
