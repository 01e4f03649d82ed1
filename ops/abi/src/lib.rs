//! `libvitrim_ops`: a library of custom operators for ONNX Runtime, with native kernels of the operators of `ai.vitrim`.
//!
//! A model that vitrim wrote carries the meaning of each operator as a function. Where this library is registered with
//! the session options, ONNX Runtime runs the kernels instead, from the same file. It needs ONNX Runtime 1.17 or newer
//! and no other library.
//!
//! - [`RegisterCustomOps`]: what ONNX Runtime calls;
//! - `ops`: the operators, with the types that they take;
//! - `operator`: one of them as ONNX Runtime wants it; no panic leaves it;
//! - `call`: tensors, memory and threads of one call.

mod call;
mod operator;
mod ops;

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Mutex;

use ort::AsPointer;
use ort::operator::OperatorDomain;
use ort::sys::{
    ORT_API_VERSION, OrtApi, OrtApiBase, OrtCustomOpDomain, OrtErrorCode, OrtLoggingLevel, OrtSessionOptions,
    OrtStatus, OrtStatusPtr,
};

/// What a process has registered: where its ONNX Runtime is, and the domain, which every session shares.
struct Registered {
    runtime: usize,
    domain: OperatorDomain,
}

// SAFETY: the domain is read only once it is made; ONNX Runtime calls its operators from any thread.
unsafe impl Send for Registered {}

static REGISTERED: Mutex<Option<Registered>> = Mutex::new(None);

/// Registers the operators with a session's options. Errors come as a status with a message: an ONNX Runtime that is too
/// old, or a second one in the same process.
///
/// # Safety
///
/// To be called by ONNX Runtime (`RegisterCustomOpsLibrary_V2` and its like): both pointers must be those that it passes.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub unsafe extern "C" fn RegisterCustomOps(options: *mut OrtSessionOptions, base: *const OrtApiBase) -> OrtStatusPtr {
    // SAFETY: as the caller promises.
    let registered = catch_unwind(AssertUnwindSafe(|| unsafe { register(options, base) }));
    match registered.unwrap_or_else(|panic| Err(panic_message(panic.as_ref()))) {
        Ok(()) => OrtStatusPtr(ptr::null_mut()),
        // SAFETY: as the caller promises.
        Err(message) => unsafe { status(base, &message) },
    }
}

/// # Safety
///
/// As for [`RegisterCustomOps`].
unsafe fn register(options: *mut OrtSessionOptions, base: *const OrtApiBase) -> Result<(), String> {
    // SAFETY: ONNX Runtime's base outlives the process's use of it.
    let (get_api, version) = unsafe { ((*base).GetApi, CStr::from_ptr(((*base).GetVersionString)())) };
    // SAFETY: the function is ONNX Runtime's; it gives null for versions that it does not have.
    let api = unsafe { get_api(ORT_API_VERSION).as_ref() };
    let api: &OrtApi = api.ok_or_else(|| {
        format!(
            "libvitrim_ops {} needs ONNX Runtime 1.{ORT_API_VERSION} or newer, and this is {}; without the library \
             the model runs as it is",
            env!("CARGO_PKG_VERSION"),
            version.to_string_lossy()
        )
    })?;
    let mut registered = REGISTERED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let runtime = get_api as usize;
    let domain = match registered.as_ref() {
        Some(known) if known.runtime != runtime => {
            return Err("libvitrim_ops serves one ONNX Runtime in a process, and another has registered it".into());
        }
        Some(known) => &known.domain,
        None => {
            ort::set_api(api.clone());
            let domain = ops::domain().map_err(|error| error.to_string())?;
            // SAFETY: the domain stays, see below.
            unsafe { announce(api, domain.ptr().cast_mut()) };
            &registered.insert(Registered { runtime, domain }).domain
        }
    };
    // SAFETY: the domain stays for as long as the process runs; options are the caller's.
    let added = unsafe { (api.AddCustomOpDomain)(options, domain.ptr().cast_mut()) };
    if added.0.is_null() {
        return Ok(());
    }
    // SAFETY: a status that is not null is ours to read and to release.
    let message = unsafe { CStr::from_ptr((api.GetErrorMessage)(added.0)) }.to_string_lossy().into_owned();
    // SAFETY: see above.
    unsafe { (api.ReleaseStatus)(added.0) };
    Err(message)
}

/// Creates a session with the domain, and closes it. ONNX Runtime lists the domain of custom operators for the process when
/// the first session with them is created, and two that are created at once fail over who is first (1.17 to 1.31).
/// Whatever goes wrong here is left for the host's session to say.
///
/// # Safety
///
/// `api` must be ONNX Runtime's, and the domain must stay for as long as the process runs.
unsafe fn announce(api: &OrtApi, domain: *mut OrtCustomOpDomain) {
    /// IR 8, operator set 17, one node: `Constant` with `value_int` 0, which is the output `y`.
    const MODEL: &[u8] =
        b"\x08\x08B\x02\x10\x11:1\n\x1f\x12\x01y\"\x08Constant*\x10\n\tvalue_int\x18\0\xa0\x01\x02\x12\x01gb\x0b\n\x01y\x12\x06\n\x04\x08\x07\x12\0";
    let (mut env, mut options, mut session) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: every call gets what the ones before made, in the order of ONNX Runtime's documentation, and what was made
    // is released once. A status is an error, after which nothing more is made.
    unsafe {
        let failed = |status: OrtStatusPtr| {
            (api.ReleaseStatus)(status.0);
            !status.0.is_null()
        };
        let name = c"vitrim_ops".as_ptr();
        let _ = failed((api.CreateEnv)(OrtLoggingLevel::ORT_LOGGING_LEVEL_WARNING, name, &mut env))
            || failed((api.CreateSessionOptions)(&mut options))
            // No threads for a session that runs nothing.
            || failed((api.SetIntraOpNumThreads)(options, 1))
            || failed((api.AddCustomOpDomain)(options, domain))
            || failed((api.CreateSessionFromArray)(env, MODEL.as_ptr().cast(), MODEL.len(), options, &mut session));
        if !session.is_null() {
            (api.ReleaseSession)(session);
        }
        if !options.is_null() {
            (api.ReleaseSessionOptions)(options);
        }
        if !env.is_null() {
            (api.ReleaseEnv)(env);
        }
    }
}

/// A status that says `message`, made by whatever API this runtime has.
///
/// # Safety
///
/// `base` must be ONNX Runtime's.
unsafe fn status(base: *const OrtApiBase, message: &str) -> OrtStatusPtr {
    /// The beginning of `OrtApi`, which every version has.
    #[repr(C)]
    struct FirstOfApi {
        create_status: unsafe extern "system" fn(OrtErrorCode, *const c_char) -> *mut OrtStatus,
    }
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // The oldest first: on standard error, a runtime complains of versions that it has not.
    for version in 1..=ORT_API_VERSION {
        // SAFETY: an API of any version begins with `CreateStatus`; ONNX Runtime gives null for those it has not.
        if let Some(api) = unsafe { ((*base).GetApi)(version).cast::<FirstOfApi>().as_ref() } {
            // SAFETY: the message is a C string, which is copied.
            return OrtStatusPtr(unsafe { (api.create_status)(OrtErrorCode::ORT_FAIL, message.as_ptr()) }.cast());
        }
    }
    OrtStatusPtr(ptr::null_mut::<c_void>().cast())
}

/// What a panic said.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("libvitrim_ops is defective: {}", said.unwrap_or("no reason given"))
}
